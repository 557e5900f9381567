"""Defines one sync middleware."""

import uuid
from typing import Any


def request_id(get_response: Any) -> Any:
    """Give each request an id: sync middleware of the project's own, as most projects have."""

    def middleware(request: Any) -> Any:
        request.id = uuid.uuid4().hex
        response = get_response(request)
        response["X-Request-Id"] = request.id
        return response

    return middleware
