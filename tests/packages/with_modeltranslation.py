"""Uses django-modeltranslation: a `threading.local`'s class controls fallbacks and filling."""

from tests.packages.project import WHO, execute, setup

project = setup(
    __name__,
    "django-modeltranslation",
    state="a class derived from `threading.local`",
    middleware=[f"{__name__}.choose_language"],
    apps=["modeltranslation"],
    LANGUAGE_CODE="en",
    LANGUAGES=[("en", "English"), ("de", "German"), ("fr", "French")],
    MODELTRANSLATION_AUTO_REGISTER=True,
)

from django.db import models  # noqa: E402
from django.utils import translation  # noqa: E402
from modeltranslation.translator import TranslationOptions, translator  # noqa: E402
from modeltranslation.utils import auto_populate, fallbacks  # noqa: E402

LANGUAGES = dict(zip(WHO, ["en", "de", "fr"], strict=True))


class Note(models.Model):
    owner = models.CharField(max_length=100)
    title = models.CharField(max_length=100)


class NoteOptions(TranslationOptions):
    fields = ("title",)


translator.register(Note, NoteOptions)


def choose_language(get_response):
    def middleware(request):
        with translation.override(LANGUAGES[request.user.username]):
            return get_response(request)

    return middleware


def work(request, who, number):
    plain = Note.objects.create(owner=who, title=who)
    with auto_populate("all"), fallbacks(False):
        filled = Note.objects.create(owner=who, title=who)
    return said(who, plain, filled)


async def awork(request, who, number):
    plain = await Note.objects.acreate(owner=who, title=who)
    with auto_populate("all"), fallbacks(False):
        filled = await Note.objects.acreate(owner=who, title=who)
    return said(who, plain, filled)


def said(who, plain, filled):
    titles = {language: getattr(plain, f"title_{language}") for language in LANGUAGES.values()}
    of_filled = {getattr(filled, f"title_{language}") for language in LANGUAGES.values()}
    ought = {language: who if language == LANGUAGES[who] else None for language in titles}
    return who if (titles, of_filled) == (ought, {who}) else f"{titles}, {of_filled}"


def wrong_rows():
    found = execute(
        "SELECT owner FROM with_modeltranslation_note "
        "WHERE NOT owner = coalesce(title_en, owner) "
        "OR NOT owner = coalesce(title_de, owner) OR NOT owner = coalesce(title_fr, owner)"
    )
    execute("TRUNCATE with_modeltranslation_note")
    return [f"another title in a note of {owner}" for (owner,) in found]
