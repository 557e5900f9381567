from django.http import HttpResponse
from django.utils.decorators import async_only_middleware

from .models import Tag


@async_only_middleware
def async_middleware(get_response):
    async def middleware(request):
        if request.path == "/library/from-middleware/":
            return HttpResponse(f"{Tag.objects.count()} tags")
        return await get_response(request)

    return middleware
