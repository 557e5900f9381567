"""Defines ``seed_menu``: puts the house's menu into the database, once."""

from decimal import Decimal

from django.core.management.base import BaseCommand
from django.db import transaction

from kitchen.models import Dish, Section

V = True  # vegetarian

MENU = {
    "To start": [
        ("Smoked beetroot", "Goat's curd, walnut, dill", "7.50", V),
        ("Onion broth", "Gruyère toast, thyme", "6.80", V),
        ("Cured trout", "Buttermilk, cucumber, rye crumb", "9.20", not V),
        ("Warm flatbread", "Cultured butter, sea salt", "4.50", V),
    ],
    "From the fire": [
        ("Half a chicken", "Lemon, burnt garlic, pan juices", "17.50", not V),
        ("Pork collar", "Roast quince, mustard greens", "19.00", not V),
        ("Whole mackerel", "Gooseberry, pickled fennel", "18.20", not V),
        ("Hispi cabbage", "Miso, hazelnut, brown butter", "13.80", V),
    ],
    "By the spoon": [
        ("Pumpkin risotto", "Sage, aged cheese, pumpkin seed", "14.50", V),
        ("White bean stew", "Kale, rosemary oil, sourdough", "12.90", V),
        ("Lamb and barley", "Root vegetables, parsley", "16.40", not V),
    ],
    "On the side": [
        ("Potatoes in ash", "Sour cream, chives", "5.20", V),
        ("Bitter leaves", "Pear, blue cheese", "5.80", V),
        ("Slow carrots", "Cumin, honey", "4.90", V),
    ],
    "Sweet": [
        ("Quince tart", "Bay leaf custard", "7.20", V),
        ("Dark chocolate", "Olive oil, salt, rye", "6.90", V),
        ("Three cheeses", "Oatcakes, quince paste", "9.50", V),
    ],
    "To drink": [
        ("House lemonade", "Lemon verbena", "4.20", V),
        ("Cider, dry", "From the barrel, 0.3 l", "5.10", V),
        ("Pot of tea", "Mint, black or rooibos", "3.60", V),
    ],
}


class Command(BaseCommand):
    help = "Put the house's menu into the database. What is there already is left as it is."

    @transaction.atomic
    def handle(self, *args, verbosity, **options):
        made = 0
        for position, (name, dishes) in enumerate(MENU.items(), 1):
            section, _ = Section.objects.get_or_create(name=name, defaults={"position": position})
            made += sum(_make(section, place, dish) for place, dish in enumerate(dishes, 1))
        if verbosity:
            self.stdout.write(f"The menu has {Dish.objects.count()} dishes, {made} of them new.")


def _make(section, position, dish):
    """Add a dish if it is missing; return whether it was."""
    name, description, price, vegetarian = dish
    defaults = {
        "description": description,
        "price": Decimal(price),
        "vegetarian": vegetarian,
        "position": position,
    }
    return Dish.objects.get_or_create(section=section, name=name, defaults=defaults)[1]
