"""Takes orders from programs, with the same form and the same rules as the page."""

import json

from django.core.exceptions import ValidationError
from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST, require_safe

from kitchen.forms import OrderForm
from kitchen.models import Section
from kitchen.placing import place


# Exempt: the view reads no cookie and acts in nobody's name. Another site could make a browser do
# nothing here that the site could not do itself.
@csrf_exempt
@require_POST
async def orders(request):
    """Place ``{"table": "7", "lines": [{"dish": 1, "quantity": 2}]}``: 201, or 400 and why."""
    try:
        form = OrderForm.from_json(_decoded(request.body), menu=list(Section.objects.menu()))
    except ValidationError as error:
        return JsonResponse({"errors": {"__all__": error.messages}}, status=400)
    if not form.is_valid():
        return JsonResponse({"errors": form.errors}, status=400)
    order = await place(request, form)
    answer = {
        "id": order.pk,
        "promised_minutes": order.promised_minutes,
        "status": order.status,
    }
    return JsonResponse(answer, status=201)


@require_safe
async def menu(request):
    """List the dishes that a program can order."""
    dishes = [
        {"id": dish.pk, "section": section.name, "name": dish.name, "price": str(dish.price)}
        for section in Section.objects.menu()
        for dish in section.dishes.all()
    ]
    return JsonResponse({"dishes": dishes})


def _decoded(body):
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        raise ValidationError("The body is not JSON.") from None
    if not isinstance(content, dict):
        raise ValidationError("The body must be a JSON object.")
    return content
