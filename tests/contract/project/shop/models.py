from django.db import models


class Product(models.Model):
    name = models.CharField(max_length=50, unique=True)
    stock = models.IntegerField(default=0)

    def __str__(self):
        return self.name


class Sale(models.Model):
    product = models.ForeignKey(Product, models.CASCADE, related_name="sales")
    number = models.IntegerField()

    def __str__(self):
        return f"{self.number} {self.product}"
