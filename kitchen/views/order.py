"""Serves the pages of an order: the menu with its form, and the state of the order."""

from django.http import Http404
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_http_methods, require_safe

from kitchen.forms import OrderForm
from kitchen.models import Order, Section
from kitchen.placing import place

REMEMBERED = 12  # orders of a guest that the session keeps


@require_http_methods(["GET", "HEAD", "POST"])
async def menu(request):
    """Show the menu; a POST places an order and leads to its page."""
    form = OrderForm(
        request.POST or None if request.method == "POST" else None,
        initial={"table": request.session.get("table", "")},
        menu=list(Section.objects.menu()),
    )
    if request.method == "POST" and form.is_valid():
        order = await place(request, form)
        _remember(request.session, order)
        return redirect(order)
    context = {"form": form, "mine": Order.objects.filter(pk__in=_mine(request))[:3]}
    return render(request, "kitchen/menu.html", context, status=422 if form.errors else 200)


@require_safe
async def order(request, pk):
    """Show an order to its guest; the page asks for this again when the board has news of it."""
    if pk not in _mine(request) and not request.user.is_staff:
        raise Http404("not an order of this guest")
    return render(
        request,
        "kitchen/order.html",
        {"order": get_object_or_404(Order.objects.with_lines(), pk=pk), "steps": Order.Status},
    )


def _mine(request):
    return request.session.get("orders", [])


def _remember(session, order):
    session["table"] = order.table
    session["orders"] = [order.pk, *session.get("orders", [])][:REMEMBERED]
