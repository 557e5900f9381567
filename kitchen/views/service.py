"""Plays the kitchen service, a slow server of somebody else's, which uses no database."""

import asyncio
import json

from django.conf import settings
from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST


@csrf_exempt  # called by servers, without a cookie, and changes nothing
@require_POST
async def estimate(request):
    """Answer ``{"lines": [{"dish": name, "quantity": n}]}`` with the minutes, after thinking."""
    try:
        portions = sum(int(line["quantity"]) for line in json.loads(request.body)["lines"])
    except (ValueError, KeyError, TypeError):
        return JsonResponse({"error": "expected lines, each with a quantity"}, status=400)
    await asyncio.sleep(settings.KITCHEN_SERVICE_SECONDS)
    return JsonResponse({"minutes": min(8 + 2 * portions, 90)})
