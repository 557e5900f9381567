"""Defines the models that the snippets of docs/ speak of."""

from __future__ import annotations

from django.db import models


class Table(models.Model):
    """A table of the restaurant."""

    number = models.IntegerField(default=1)


class Customer(models.Model):
    """Somebody who orders."""

    name = models.CharField(max_length=40, default="Ada")


class Account(models.Model):
    """An account of a customer."""

    balance = models.IntegerField(default=0)


class Order(models.Model):
    """An order."""

    number = models.IntegerField(default=1)
    table = models.ForeignKey(Table, models.CASCADE, null=True)
    customer = models.ForeignKey(Customer, models.CASCADE, null=True)
    promise = models.IntegerField(null=True)


class Line(models.Model):
    """A line of an order."""

    order = models.ForeignKey(Order, models.CASCADE, related_name="lines")
    dish = models.CharField(max_length=40)


class Receipt(models.Model):
    """A receipt for an order."""

    order = models.ForeignKey(Order, models.CASCADE)
