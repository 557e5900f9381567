from django.http import HttpResponse
from django.urls import path


def page(request):
    return HttpResponse()


urlpatterns = [path("public/", page, name="public"), path("private/", page, name="private")]
