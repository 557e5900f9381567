"""Shows the status page: how few connections serve how many requests."""

from django import forms
from django.conf import settings
from django.contrib import messages
from django.http import JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from kitchen import rush as rushes
from kitchen import sse
from kitchen import status as live
from kitchen.models import Dish


class RushForm(forms.Form):
    size = forms.IntegerField(
        label="Orders at once",
        min_value=1,
        max_value=rushes.MAX_SIZE,
        initial=200,
        widget=forms.NumberInput(attrs={"step": 1}),
    )


@require_safe
async def status(request):
    context = {"now": live.numbers(), "form": RushForm(), "may_rush": _may_rush(request)}
    return render(request, "kitchen/status.html", context)


@require_safe
async def feed(request):
    """Send the numbers as server-sent events."""
    return sse.stream(live.feed.get().watch())


@require_POST
async def rush(request):
    """Start a rush in the background; the feed reports its progress."""
    form = RushForm(request.POST)
    if not _may_rush(request):
        return _answer(request, "Sign in as staff to start a rush.", status=403)
    if not form.is_valid():
        return _answer(request, " ".join(form.errors["size"]), status=400)
    dishes = list(Dish.objects.available().values_list("pk", flat=True))
    if not dishes:
        return _answer(request, "There is nothing on the menu to order.", status=409)
    if not rushes.current.get().start(request, dishes, form.cleaned_data["size"]):
        return _answer(request, "A rush is on already.", status=409)
    return _answer(request, f"{form.cleaned_data['size']} orders are on their way.", status=202)


def _may_rush(request):
    return settings.KITCHEN_RUSH_OPEN or request.user.is_staff


def _answer(request, message, status):
    if not request.accepts("text/html"):
        return JsonResponse({"message": message}, status=status)
    messages.add_message(request, messages.ERROR if status >= 400 else messages.SUCCESS, message)
    return redirect("kitchen:status")
