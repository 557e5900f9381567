"""The Django stacks: the same models, settings and URLs; the views are each stack's own."""
