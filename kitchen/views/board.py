"""Shows the board: every order on its way from the kitchen to the table."""

from django.contrib import messages
from django.http import HttpResponseBadRequest, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from kitchen import board as news
from kitchen import placing, sse
from kitchen.models import Order

LIMIT = 24  # cards a column; the number in its head counts all orders
LIMIT_SERVED = 8


def columns():
    """Return the board's columns: the oldest of the open orders, the latest of the served."""
    orders = Order.objects.with_lines()
    served = list(
        orders.filter(status=Order.Status.SERVED).order_by("-changed_at", "-pk")[:LIMIT_SERVED]
    )
    shown = [*orders.open().first_of_each_status(LIMIT), *served]
    counts = Order.objects.count_by_status()
    return [_column(status, counts[status], shown) for status in Order.Status]


def _column(status, count, shown):
    orders = [order for order in shown if order.status == status]
    # The counts come a moment after the orders, so ``more`` may be a few off, or below zero.
    return {"status": status, "orders": orders, "count": count, "more": count - len(orders)}


@require_safe
async def board(request):
    return render(request, "kitchen/board.html", {"columns": columns()})


@require_safe
async def board_columns(request):
    """Render only the columns of the board, which replace those of an open page."""
    return render(request, "kitchen/_columns.html", {"columns": columns()})


@require_safe
async def events(request):
    """Send the board's news as server-sent events; ``?order=`` narrows them down to one order."""
    order_id = request.GET.get("order")
    if order_id is not None and not order_id.isdecimal():
        return HttpResponseBadRequest("order must be a number")
    return sse.stream(news.listener.get().watch(int(order_id) if order_id else None))


@require_POST
async def move(request, pk):
    """Move an order on, for the staff. Scripts get JSON, forms get the board again."""
    if not request.user.is_staff:
        return _answer(request, "Sign in as staff to move orders.", status=403)
    try:
        moved = placing.move_on(pk, seen=request.POST.get("seen", ""))
    except Order.DoesNotExist:
        return _answer(request, f"Order {pk} is gone.", status=404)
    except placing.Busy:
        return _answer(request, f"Somebody is changing order {pk}: try again.", status=409)
    if moved is None:
        return _answer(request, f"Order {pk} has been moved by somebody else.", status=409)
    return _answer(request, f"Order {pk} is {moved.get_status_display().lower()}.")


@require_POST
async def clear(request):
    """Mark everything as served: the end of a shift, or of a rush."""
    if not request.user.is_staff:
        return _answer(request, "Sign in as staff to clear the board.", status=403)
    return _answer(request, f"{placing.clear()} orders marked as served.")


def _answer(request, message, status=200):
    if not request.accepts("text/html"):
        return JsonResponse({"message": message}, status=status)
    if status == 403 and not request.user.is_authenticated:
        return redirect("login")
    messages.add_message(request, messages.ERROR if status >= 400 else messages.SUCCESS, message)
    return redirect("kitchen:board")
