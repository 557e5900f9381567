"""Defines models for the tables of schema.sql; each table bears the name that Django gives it."""

from __future__ import annotations

from django.db import models


class Row(models.Model):
    id = models.IntegerField(primary_key=True)
    name = models.CharField(max_length=40)
    number = models.IntegerField()
    price = models.DecimalField(max_digits=8, decimal_places=2)
    at = models.DateTimeField()

    def __str__(self) -> str:
        return self.name


class Counter(models.Model):
    id = models.IntegerField(primary_key=True)
    number = models.IntegerField()

    def __str__(self) -> str:
        return str(self.number)


class Entry(models.Model):
    id = models.BigAutoField(primary_key=True)
    name = models.CharField(max_length=40)
    number = models.IntegerField()

    def __str__(self) -> str:
        return self.name


class Author(models.Model):
    id = models.IntegerField(primary_key=True)
    name = models.CharField(max_length=40)

    def __str__(self) -> str:
        return self.name


class Book(models.Model):
    id = models.IntegerField(primary_key=True)
    title = models.CharField(max_length=80)
    author = models.ForeignKey(Author, models.CASCADE, related_name="books")

    def __str__(self) -> str:
        return self.title


class Review(models.Model):
    id = models.IntegerField(primary_key=True)
    stars = models.IntegerField()
    text = models.CharField(max_length=80)
    book = models.ForeignKey(Book, models.CASCADE, related_name="reviews")

    class Meta:
        ordering = ("id",)

    def __str__(self) -> str:
        return self.text
