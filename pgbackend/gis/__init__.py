"""The backend for GeoDjango: ``ENGINE = "pgbackend.gis"``, for PostgreSQL with PostGIS.

`pgbackend` mixed into `django.contrib.gis.db.backends.postgis`. What differs from the two is here;
modules bear the names that Django's backends have.
"""
