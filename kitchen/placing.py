"""Places an order and moves it on: the pages and the API share these steps."""

from datetime import timedelta

from django.db import OperationalError, transaction
from django.utils import timezone
from psycopg.errors import LockNotAvailable

import pgbackend
from kitchen import board, service
from kitchen.models import Order, OrderLine

#: How long a click on the board waits for a colleague's, before it is told to try again.
LOCK_TIMEOUT = timedelta(seconds=3)


class Busy(Exception):  # noqa: N818 - a status, not a fault
    """Somebody else has been changing the order for longer than ``LOCK_TIMEOUT``."""


async def place(request, form):
    """Write the order of a valid ``form``, ask the kitchen for a promise, and write that too.

    There are two short transactions with a slow HTTP call between them. The order is kept even if
    the call fails; each ``save`` tells the board (see ``kitchen.board``) when its block commits.
    """
    with transaction.atomic():
        order = form.save()
        lines = form.cleaned_data["lines"]
        OrderLine.objects.bulk_create(
            OrderLine(order=order, dish=dish, quantity=quantity, price=dish.price)
            for dish, quantity in lines
        )
    order.promised_minutes = await service.promised_minutes(request, lines)
    if order.promised_minutes is not None:
        with transaction.atomic():
            # Only the promise is saved: the kitchen may have moved the order on meanwhile.
            order.save(update_fields=["promised_minutes"])
    return order


def move_on(order_id, *, seen):
    """Move an order to its next status, if its status is still ``seen``, the one the staff saw.

    Returns the order, moved, or ``None`` if a colleague was quicker. Raises ``Busy`` if a colleague
    keeps the order locked.
    """
    try:
        # PostgreSQL's timeout is in force for these statements only, on whichever connection.
        with pgbackend.session(lock_timeout=LOCK_TIMEOUT), transaction.atomic():
            order = Order.objects.select_for_update().get(pk=order_id)
            if order.status != seen or order.next_status is None:
                return None
            order.status = order.next_status
            order.save(update_fields=["status", "changed_at"])
    except OperationalError as error:
        if isinstance(error.__cause__, LockNotAvailable):
            raise Busy from None
        raise
    return order


def clear():
    """Mark every open order as served; return how many there were."""
    with transaction.atomic():
        served = Order.objects.open().update(status=Order.Status.SERVED, changed_at=timezone.now())
        board.announce({"cleared": served})  # ``update`` sends no signal, and one is enough
    return served
