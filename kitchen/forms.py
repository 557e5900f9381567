"""Defines the order form: one quantity for each dish on the menu, for people and programs."""

from django import forms

from kitchen.models import MAX_QUANTITY, Order


class OrderForm(forms.ModelForm):
    """Takes an order of the dishes in ``menu`` (a list of sections, with dishes prefetched).

    The page posts ``dish_<id>`` fields; ``from_json`` builds the same form from an API request, so
    that both are held to one set of rules. ``cleaned_data["lines"]`` has (dish, quantity) pairs.
    """

    class Meta:
        model = Order
        fields = ["table", "note"]
        widgets = {
            "table": forms.TextInput(attrs={"autocomplete": "off", "placeholder": "7, or Ada"}),
            "note": forms.Textarea(attrs={"rows": 2, "placeholder": "No onions, please"}),
        }

    def __init__(self, *args, menu, **kwargs):
        super().__init__(*args, **kwargs)
        self.menu = menu
        self.dishes = {dish.pk: dish for section in menu for dish in section.dishes.all()}
        for dish in self.dishes.values():
            self.fields[f"dish_{dish.pk}"] = forms.IntegerField(
                label=dish.name,
                required=False,
                min_value=0,
                max_value=MAX_QUANTITY,
                widget=forms.NumberInput(attrs={"placeholder": 0, "inputmode": "numeric"}),
            )

    @classmethod
    def from_json(cls, content, *, menu):
        """Bind a form to an API request; raise ``forms.ValidationError`` if it has no lines."""
        data = {name: content.get(name, "") for name in cls.Meta.fields}
        for dish, quantity in _lines(content):
            field = f"dish_{dish}"
            data[field] = data.get(field, 0) + quantity
        form = cls(data, menu=menu)
        form.unknown = [name for name in data if name not in form.fields]
        return form

    unknown = ()

    def clean(self):
        cleaned = super().clean()
        if self.unknown:
            raise forms.ValidationError("A dish is not on the menu.", code="unknown_dish")
        cleaned["lines"] = [
            (dish, quantity)
            for dish in self.dishes.values()
            if (quantity := cleaned.get(f"dish_{dish.pk}"))
        ]
        if not cleaned["lines"] and not self.errors:
            raise forms.ValidationError("Choose at least one dish.", code="empty")
        return cleaned

    def sections(self):
        """Yield, for the template, each section with its dishes and their fields."""
        for section in self.menu:
            yield section, [(dish, self[f"dish_{dish.pk}"]) for dish in section.dishes.all()]


def _lines(content):
    """Return the (dish id, quantity) pairs of an API request, whose shape is checked here."""
    lines = content.get("lines")
    if not isinstance(lines, list):
        raise forms.ValidationError('"lines" must be a list of {dish, quantity}.')
    for line in lines:
        given = line if isinstance(line, dict) else {}
        dish, quantity = given.get("dish"), given.get("quantity")
        if type(dish) is not int or type(quantity) is not int:
            raise forms.ValidationError('A line needs a whole "dish" and a whole "quantity".')
        yield dish, quantity
