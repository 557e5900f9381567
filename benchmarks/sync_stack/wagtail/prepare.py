"""Makes the tables and pages, and prints what a client needs: a JSON object."""

import json

import django
from django.core.management import call_command

PAGES = 50


def main() -> None:
    django.setup()
    from home.models import HomePage

    call_command("migrate", verbosity=0)
    home = HomePage.objects.get()
    for number in range(PAGES):
        page = HomePage(title=f"page {number}", slug=f"page-{number}", show_in_menus=True)
        home.add_child(instance=page)
    print(json.dumps({"pages": PAGES}))


if __name__ == "__main__":
    main()
