"""An ordinary small Django app, which knows nothing of pgbackend: the tests switch its ENGINE."""
