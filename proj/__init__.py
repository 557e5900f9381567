"""Configures the Django project that shows ``pgbackend`` at work: a restaurant's order desk."""
