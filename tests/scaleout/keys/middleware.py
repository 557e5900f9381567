"""Answers a request with a key that was used before as it was answered then.

The key is inserted first. While a transaction with the same key is open elsewhere, PostgreSQL lets
the INSERT wait for its end, so that a second attempt sees whether the first one was committed.
"""

from __future__ import annotations

import json

from django.db import transaction
from django.http import JsonResponse

from tests.scaleout.keys.models import Key


class KeyMiddleware:
    async_capable = True
    sync_capable = False

    def __init__(self, get_response) -> None:
        from asgiref.sync import markcoroutinefunction

        self.get_response = get_response
        markcoroutinefunction(self)

    async def __call__(self, request):
        if key := request.headers.get("Idempotency-Key"):
            return await self._once(key, request)
        return await self.get_response(request)

    async def _once(self, key: str, request):
        async with transaction.atomic():
            # The lock counts as a write: whoever gets an old answer sees what it tells of, too.
            keys = Key.objects.select_for_update()
            record, new = await keys.aget_or_create(key=key)
            if not new:
                return JsonResponse(record.answer, status=201)
            response = await self.get_response(request)
            if response.status_code == 201:
                record.answer = json.loads(response.content)
                await record.asave()
            else:
                transaction.set_rollback(True)
        return response
