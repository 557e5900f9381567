"""An app with the models that the snippets of docs/ speak of."""
