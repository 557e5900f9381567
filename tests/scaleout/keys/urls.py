"""Adds to the site the order of a key, for its client to read."""

from __future__ import annotations

from django.http import JsonResponse
from django.shortcuts import get_object_or_404
from django.urls import include, path

from kitchen.models import Order
from tests.scaleout.keys.models import Key


async def order(request, key):
    """Show the lines of the order that was placed with a key; by ordinary reads."""
    record = await Key.objects.filter(key=key).afirst()
    if record is None:
        return JsonResponse({}, status=404)
    placed = get_object_or_404(Order.objects.with_lines(), pk=record.answer["id"])
    lines = [{"dish": line.dish_id, "quantity": line.quantity} for line in placed.lines.all()]
    return JsonResponse({"id": placed.pk, "lines": lines, "from": placed._state.db})


urlpatterns = [
    path("keys/<str:key>/", order),
    path("", include("proj.cluster.urls")),
]
