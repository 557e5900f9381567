"""Defines the menu (sections and dishes) and the orders with their lines."""

from decimal import Decimal

from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import Count, F, Q, Sum, Window
from django.db.models.functions import RowNumber
from django.urls import reverse

MAX_QUANTITY = 20


class SectionQuerySet(models.QuerySet):
    def menu(self):
        """Return the sections that offer something, each with its dishes in ``dishes.all()``."""
        dishes = models.Prefetch("dishes", queryset=Dish.objects.available())
        return self.filter(dishes__available=True).distinct().prefetch_related(dishes)


class Section(models.Model):
    name = models.CharField(max_length=60, unique=True)
    position = models.PositiveSmallIntegerField(default=0)

    objects = SectionQuerySet.as_manager()

    class Meta:
        ordering = ["position", "name"]

    def __str__(self):
        return self.name


class DishQuerySet(models.QuerySet):
    def available(self):
        return self.filter(available=True)


class Dish(models.Model):
    section = models.ForeignKey(Section, on_delete=models.PROTECT, related_name="dishes")
    name = models.CharField(max_length=80)
    description = models.CharField(max_length=200, blank=True)
    price = models.DecimalField(max_digits=6, decimal_places=2, validators=[MinValueValidator(0)])
    vegetarian = models.BooleanField(default=False)
    available = models.BooleanField(default=True, help_text="Off: hidden from the menu.")
    position = models.PositiveSmallIntegerField(default=0)

    objects = DishQuerySet.as_manager()

    class Meta:
        ordering = ["section__position", "position", "name"]
        verbose_name_plural = "dishes"
        constraints = [
            models.UniqueConstraint(fields=["section", "name"], name="dish_once_a_section"),
            models.CheckConstraint(condition=Q(price__gte=0), name="dish_price_not_negative"),
        ]

    def __str__(self):
        return self.name


class OrderQuerySet(models.QuerySet):
    def open(self):
        """Return the orders that someone still waits for."""
        return self.exclude(status=Order.Status.SERVED)

    def with_lines(self):
        return self.prefetch_related("lines__dish")

    def with_totals(self):
        """Annotate ``portions`` and ``amount``, for lists that do not load the lines."""
        return self.annotate(
            portions=Sum("lines__quantity", default=0),
            amount=Sum(F("lines__quantity") * F("lines__price"), default=Decimal(0)),
        )

    def first_of_each_status(self, limit):
        """Return the oldest orders of each status, in one statement: first come, first served."""
        place = Window(RowNumber(), partition_by="status", order_by=["created_at", "pk"])
        return self.annotate(place=place).filter(place__lte=limit).order_by("created_at", "pk")

    def count_by_status(self):
        rows = self.order_by().values_list("status").annotate(Count("pk"))
        return dict.fromkeys(Order.Status.values, 0) | dict(rows)


class Order(models.Model):
    class Status(models.TextChoices):
        ACCEPTED = "accepted", "New"
        COOKING = "cooking", "Cooking"
        READY = "ready", "Ready"
        SERVED = "served", "Served"

    # The status after each status, and the label of the button that moves an order there.
    STEPS = {
        Status.ACCEPTED: (Status.COOKING, "Start cooking"),
        Status.COOKING: (Status.READY, "Mark as ready"),
        Status.READY: (Status.SERVED, "Mark as served"),
    }

    table = models.CharField("table or name", max_length=40)
    note = models.CharField("note for the kitchen", max_length=200, blank=True)
    status = models.CharField(max_length=10, choices=Status, default=Status.ACCEPTED)
    promised_minutes = models.PositiveSmallIntegerField(null=True, blank=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    changed_at = models.DateTimeField(auto_now=True)

    objects = OrderQuerySet.as_manager()

    class Meta:
        ordering = ["-created_at", "-pk"]
        indexes = [
            # The board reads little else, and served orders soon outnumber the open ones.
            models.Index(
                fields=["status", "created_at"],
                name="order_open",
                condition=~Q(status="served"),
            ),
            models.Index(
                fields=["-changed_at"], name="order_last_served", condition=Q(status="served")
            ),
            models.Index(fields=["-created_at", "-id"], name="order_newest"),
        ]
        constraints = [
            models.CheckConstraint(
                condition=Q(status__in=["accepted", "cooking", "ready", "served"]),
                name="order_status_known",
            ),
        ]

    def __str__(self):
        return f"Order {self.pk} for {self.guest}"

    def get_absolute_url(self):
        return reverse("kitchen:order", args=[self.pk])

    @property
    def guest(self):
        """Name the order's guest in words: a bare number is a table's."""
        return f"Table {self.table}" if self.table.isdecimal() else self.table

    @property
    def total(self):
        return sum((line.amount for line in self.lines.all()), Decimal(0))

    @property
    def next_status(self):
        return self.STEPS.get(self.status, (None, ""))[0]

    @property
    def next_label(self):
        return self.STEPS.get(self.status, (None, ""))[1]


class OrderLine(models.Model):
    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="lines")
    dish = models.ForeignKey(Dish, on_delete=models.PROTECT, related_name="+")
    quantity = models.PositiveSmallIntegerField(
        validators=[MinValueValidator(1), MaxValueValidator(MAX_QUANTITY)]
    )
    price = models.DecimalField(
        max_digits=6, decimal_places=2, help_text="For one, when it was ordered."
    )

    class Meta:
        ordering = ["pk"]
        constraints = [
            models.UniqueConstraint(fields=["order", "dish"], name="line_once_a_dish"),
            models.CheckConstraint(
                condition=Q(quantity__gte=1, quantity__lte=MAX_QUANTITY),
                name="line_quantity_in_range",
            ),
            models.CheckConstraint(condition=Q(price__gte=0), name="line_price_not_negative"),
        ]

    def __str__(self):
        return f"{self.quantity} × {self.dish}"

    @property
    def amount(self):
        return self.quantity * self.price
