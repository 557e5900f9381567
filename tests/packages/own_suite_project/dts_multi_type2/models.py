from django.db import models


class TypeTwoOnly(models.Model):
    name = models.CharField(max_length=50)
