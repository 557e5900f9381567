"""Defines models with a foreign key, a many-to-many, a large field, and a `save()` of their own."""

from django.contrib.contenttypes.fields import GenericForeignKey, GenericRelation
from django.contrib.contenttypes.models import ContentType
from django.db import models
from django.db.models.signals import post_save
from django.dispatch import receiver


class Author(models.Model):
    name = models.CharField(max_length=100)

    def __str__(self):
        return self.name


class Tag(models.Model):
    name = models.CharField(max_length=50, unique=True)

    def __str__(self):
        return self.name


class Note(models.Model):
    text = models.CharField(max_length=100)
    content_type = models.ForeignKey(ContentType, models.CASCADE)
    object_id = models.PositiveBigIntegerField()
    subject = GenericForeignKey()

    def __str__(self):
        return self.text


class Book(models.Model):
    title = models.CharField(max_length=100)
    author = models.ForeignKey(Author, models.CASCADE, related_name="books")
    tags = models.ManyToManyField(Tag, related_name="books", blank=True)
    text = models.TextField(blank=True)
    saves = models.PositiveIntegerField(default=0)
    notes = GenericRelation(Note)

    def __str__(self):
        return self.title

    def save(self, *args, **kwargs):
        self.saves += 1
        if (fields := kwargs.get("update_fields")) is not None:
            kwargs["update_fields"] = {*fields, "saves"}
        super().save(*args, **kwargs)


class Entry(models.Model):
    """Records the call of a signal's receiver, in the transaction of the sender."""

    text = models.CharField(max_length=200)

    def __str__(self):
        return self.text


@receiver(post_save, sender=Author)
def write_down(sender, instance, created, **kwargs):
    Entry.objects.create(text=f"{'new' if created else 'old'} {instance.name}")
