"""Passes: by one the admin's page reads statistics without a query, while no connection is free.

To know the user of a request takes two statements, which an exhausted pool does not serve: just
then the page is wanted. So each answer to a user with the permission brings a pass, which the page
sends along with its next request. A pass is signed, and holds for the browser's session cookie and
for one site of the admin. For `RENEW` seconds it stands for the permission; after that the
permission is looked up again. While that would have to wait, the pass stands for it for `LONGEST`
seconds.
"""

from __future__ import annotations

from django.core.signing import BadSignature, TimestampSigner
from django.http import HttpRequest
from django.utils.crypto import constant_time_compare, salted_hmac

from . import conf

#: The header in which the page sends its pass.
HEADER = "X-Pgbackend-Pass"

#: Seconds for which a pass stands for the permission.
RENEW = 30

#: Seconds for which it does so while the permission cannot be looked up.
LONGEST = 300

_SALT = "pgbackend.passes"


def issue(request: HttpRequest, site: str) -> str:
    """Return a pass for the session of `request`; "" if the request has no session cookie.

    `site` is the name of the admin's site.
    """
    named = _named(request, site)
    return "" if named is None else TimestampSigner(salt=_SALT).sign(named)


def is_valid(request: HttpRequest, site: str, seconds: int) -> bool:
    """Return whether `request` brings a pass of its session that is at most `seconds` old."""
    named, given = _named(request, site), request.headers.get(HEADER)
    if named is None or given is None:
        return False
    try:
        signed = TimestampSigner(salt=_SALT).unsign(given, max_age=seconds)
    except BadSignature:
        return False
    return constant_time_compare(signed, named)


def _named(request: HttpRequest, site: str) -> str | None:
    """Return a text that stands for the session and the site, and shows nothing of the session."""
    cookie = request.COOKIES.get(conf.of_project("SESSION_COOKIE_NAME"))
    if not cookie:
        return None
    return salted_hmac(f"{_SALT} {site}", cookie, algorithm="sha256").hexdigest()
