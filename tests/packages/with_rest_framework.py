"""Uses djangorestframework: each view calls a view of the package, under `ATOMIC_REQUESTS`."""

import copy

from tests.packages.project import green, rows_of_others, setup

project = setup(
    __name__,
    "djangorestframework",
    state="the request; `set_rollback()` on the connection, with `ATOMIC_REQUESTS`",
    database={"ATOMIC_REQUESTS": True},
    apps=["rest_framework"],
    REST_FRAMEWORK={"DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"]},
)

from django.db import models, transaction  # noqa: E402
from rest_framework import exceptions, serializers  # noqa: E402
from rest_framework.response import Response  # noqa: E402
from rest_framework.throttling import UserRateThrottle  # noqa: E402
from rest_framework.views import APIView  # noqa: E402


class Note(models.Model):
    owner = models.CharField(max_length=100)
    author = models.CharField(max_length=100)


class NoteSerializer(serializers.ModelSerializer):
    author = serializers.HiddenField(default=serializers.CurrentUserDefault())

    class Meta:
        model = Note
        fields = ["owner", "author"]

    def validate_author(self, user):
        return user.username


class Throttle(UserRateThrottle):
    rate = "10000/second"


class Notes(APIView):
    throttle_classes = [Throttle]

    def get(self, request):
        data = {"owner": request.headers["who"]}
        serializer = NoteSerializer(data=data, context={"request": request})
        serializer.is_valid(raise_exception=True)
        note = serializer.save()
        assert Note.objects.filter(pk=note.pk, author=request.user).exists()
        return Response(note.author)


class Refused(APIView):
    def get(self, request):
        Note.objects.create(owner="refused", author=request.user.username)
        raise exceptions.PermissionDenied(request.user.username)


notes = Notes.as_view()
refused = Refused.as_view()


def work(request, who, number):
    with transaction.atomic():
        # The exception marks this block, the innermost, to be rolled back.
        assert refused(copy.copy(request)).data["detail"] == who
    assert not Note.objects.filter(owner="refused").exists()
    return notes(copy.copy(request)).data


async def awork(request, who, number):
    return await green(work, request, who, number)


def wrong_rows():
    return rows_of_others(Note)
