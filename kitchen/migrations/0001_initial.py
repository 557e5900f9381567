import django.core.validators
import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True

    dependencies = []

    operations = [
        migrations.CreateModel(
            name="Section",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=60, unique=True)),
                ("position", models.PositiveSmallIntegerField(default=0)),
            ],
            options={
                "ordering": ["position", "name"],
            },
        ),
        migrations.CreateModel(
            name="Order",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("table", models.CharField(max_length=40, verbose_name="table or name")),
                (
                    "note",
                    models.CharField(
                        blank=True, max_length=200, verbose_name="note for the kitchen"
                    ),
                ),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("accepted", "New"),
                            ("cooking", "Cooking"),
                            ("ready", "Ready"),
                            ("served", "Served"),
                        ],
                        default="accepted",
                        max_length=10,
                    ),
                ),
                (
                    "promised_minutes",
                    models.PositiveSmallIntegerField(blank=True, editable=False, null=True),
                ),
                ("created_at", models.DateTimeField(auto_now_add=True)),
                ("changed_at", models.DateTimeField(auto_now=True)),
            ],
            options={
                "ordering": ["-created_at", "-pk"],
                "indexes": [
                    models.Index(
                        condition=models.Q(("status", "served"), _negated=True),
                        fields=["status", "created_at"],
                        name="order_open",
                    ),
                    models.Index(
                        condition=models.Q(("status", "served")),
                        fields=["-changed_at"],
                        name="order_last_served",
                    ),
                    models.Index(fields=["-created_at", "-id"], name="order_newest"),
                ],
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(
                            ("status__in", ["accepted", "cooking", "ready", "served"])
                        ),
                        name="order_status_known",
                    )
                ],
            },
        ),
        migrations.CreateModel(
            name="Dish",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                ("name", models.CharField(max_length=80)),
                ("description", models.CharField(blank=True, max_length=200)),
                (
                    "price",
                    models.DecimalField(
                        decimal_places=2,
                        max_digits=6,
                        validators=[django.core.validators.MinValueValidator(0)],
                    ),
                ),
                ("vegetarian", models.BooleanField(default=False)),
                (
                    "available",
                    models.BooleanField(default=True, help_text="Off: hidden from the menu."),
                ),
                ("position", models.PositiveSmallIntegerField(default=0)),
                (
                    "section",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="dishes",
                        to="kitchen.section",
                    ),
                ),
            ],
            options={
                "verbose_name_plural": "dishes",
                "ordering": ["section__position", "position", "name"],
            },
        ),
        migrations.CreateModel(
            name="OrderLine",
            fields=[
                (
                    "id",
                    models.BigAutoField(
                        auto_created=True, primary_key=True, serialize=False, verbose_name="ID"
                    ),
                ),
                (
                    "quantity",
                    models.PositiveSmallIntegerField(
                        validators=[
                            django.core.validators.MinValueValidator(1),
                            django.core.validators.MaxValueValidator(20),
                        ]
                    ),
                ),
                (
                    "price",
                    models.DecimalField(
                        decimal_places=2, help_text="For one, when it was ordered.", max_digits=6
                    ),
                ),
                (
                    "dish",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="+",
                        to="kitchen.dish",
                    ),
                ),
                (
                    "order",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE,
                        related_name="lines",
                        to="kitchen.order",
                    ),
                ),
            ],
            options={
                "ordering": ["pk"],
                "constraints": [
                    models.UniqueConstraint(fields=("order", "dish"), name="line_once_a_dish"),
                    models.CheckConstraint(
                        condition=models.Q(("quantity__gte", 1), ("quantity__lte", 20)),
                        name="line_quantity_in_range",
                    ),
                    models.CheckConstraint(
                        condition=models.Q(("price__gte", 0)), name="line_price_not_negative"
                    ),
                ],
            },
        ),
        migrations.AddConstraint(
            model_name="dish",
            constraint=models.UniqueConstraint(
                fields=("section", "name"), name="dish_once_a_section"
            ),
        ),
        migrations.AddConstraint(
            model_name="dish",
            constraint=models.CheckConstraint(
                condition=models.Q(("price__gte", 0)), name="dish_price_not_negative"
            ),
        ),
    ]
