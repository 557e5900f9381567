"""An ordinary small Django project, which knows nothing of pgbackend: the tests switch its ENGINE."""
