from functools import partial

from django.contrib.auth.decorators import login_required
from django.db import transaction
from django.http import HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404

from . import ways
from .models import Product, Sale

told = []


async def products(request):
    return JsonResponse({product.name: product.stock for product in Product.objects.order_by("pk")})


async def sell(request, name):
    """Sell one, and record the sale when the transaction has committed."""
    with transaction.atomic():
        product = get_object_or_404(Product.objects.select_for_update(), name=name)
        product.stock -= 1
        product.save()
        sale = Sale.objects.create(product=product, number=1)
        transaction.on_commit(partial(told.append, sale.pk))
    return JsonResponse({"left": product.stock})


def products_sync(request):
    return JsonResponse({"products": Product.objects.count()})


@login_required
async def account(request):
    return HttpResponse((await request.auser()).username)


async def page(request):
    names = [sale.product.name for sale in Sale.objects.select_related("product")]
    return HttpResponse(f"<html><body>{Product.objects.count()} {names}</body></html>")


def page_sync(request):
    return HttpResponse(f"<html><body>{Product.objects.count()}</body></html>")


async def add(request, name):
    return JsonResponse({"names": ways.add(name)})


def add_sync(request, name):
    return JsonResponse({"names": ways.add(name)})
