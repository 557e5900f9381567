from django.contrib.auth.models import User
from django.db import models


class DummyModel(models.Model):
    name = models.CharField(max_length=50)


class ModelWithFkToPublicUser(models.Model):
    user = models.ForeignKey(User, on_delete=models.CASCADE)
