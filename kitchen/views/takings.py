"""Lists what was sold, as a file for a spreadsheet: an ordinary sync view, which streams.

Under ``proj.asgi`` Django runs it in a thread, and reads all lines before it sends the first. Under
``proj.asgi_green`` it runs on the event loop, and sends each page of lines as the client takes it.
"""

import csv

from django.contrib.auth.decorators import permission_required
from django.db.models import F, Sum
from django.http import StreamingHttpResponse
from django.views.decorators.http import require_safe

from kitchen.models import OrderLine

PAGE = 500  # lines of one statement: no connection is held while the client takes them


class _Echo:
    """Returns what a ``csv`` writer writes, instead of keeping it."""

    def write(self, line):
        return line


@require_safe
@permission_required("kitchen.view_order", raise_exception=True)
def takings(request):
    headers = {"Content-Disposition": 'attachment; filename="takings.csv"'}
    return StreamingHttpResponse(_pages(), content_type="text/csv", headers=headers)


def _pages():
    write = csv.writer(_Echo()).writerow
    yield write(["day", "dish", "portions", "amount"])
    sales = (
        OrderLine.objects.values_list("order__created_at__date", "dish__name")
        .annotate(portions=Sum("quantity"), amount=Sum(F("quantity") * F("price")))
        .order_by("order__created_at__date", "dish__name")
    )
    first = 0
    while rows := list(sales[first : first + PAGE]):
        yield "".join(map(write, rows))
        first += len(rows)
