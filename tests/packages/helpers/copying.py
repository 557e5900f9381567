"""Uses django-postgres-copy: rows from CSV and to CSV, by COPY and a temporary table."""

from __future__ import annotations

from io import BytesIO, StringIO

from django.db import transaction

from tests.packages.helpers.contexts import Meeting, at_once
from tests.packages.helpers.models import Part
from tests.packages.project import green

PACKAGE = "django-postgres-copy"
ROWS = [(f"part {n}", n) for n in range(300)]


def csv(rows: list[tuple[str, int]]) -> StringIO:
    return StringIO("name,stock\n" + "".join(f"{name},{stock}\n" for name, stock in rows))


def rows() -> list[tuple[str, int]]:
    return [*Part.objects.order_by("stock").values_list("name", "stock")]


def rows_come_from_csv() -> None:
    """With its indexes dropped and made again, which is the package's default."""
    Part.objects.all().delete()
    assert Part.objects.from_csv(csv(ROWS)) == 300
    assert rows() == ROWS


def rows_come_from_csv_in_a_block() -> None:
    Part.objects.all().delete()
    with transaction.atomic():
        Part.objects.from_csv(csv(ROWS), drop_constraints=False, drop_indexes=False)
        transaction.set_rollback(True)
    assert rows() == []


def rows_go_to_csv() -> None:
    Part.objects.all().delete()
    Part.objects.bulk_create(Part(name=name, stock=stock) for name, stock in ROWS)
    query = Part.objects.filter(stock__lt=3).order_by("stock")
    expected = "name,stock\npart 0,0\npart 1,1\npart 2,2\n"
    assert query.to_csv(None, "name", "stock").decode() == expected
    file = BytesIO()
    query.to_csv(file, "name", "stock")
    assert file.getvalue().decode() == expected


def two_loads_do_not_share_a_temporary_table() -> None:
    Part.objects.all().delete()
    meeting = Meeting()

    def load(first: int, last: int) -> int:
        meeting.wait()
        lines = csv(ROWS[first:last])
        return Part.objects.from_csv(lines, drop_constraints=False, drop_indexes=False)

    assert at_once(lambda: load(0, 100), lambda: load(100, 300)) == [100, 200]
    assert rows() == ROWS


CASES = [
    rows_come_from_csv,
    rows_come_from_csv_in_a_block,
    rows_go_to_csv,
    two_loads_do_not_share_a_temporary_table,
]


async def rows_are_loaded_from_async_code() -> None:
    await green(rows_come_from_csv)
    assert await Part.objects.acount() == 300


ASYNC_CASES = [rows_are_loaded_from_async_code]
