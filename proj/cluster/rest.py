"""Asks Patroni over its REST interface, and tells it to switch over."""

import json
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import suppress

from proj.cluster.layout import HOST
from proj.cluster.programs import ClusterError

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy to this machine


def members(layout):
    """Return what Patroni knows of the members, from the first one that answers; else nothing."""
    for member in layout.members:
        with suppress(OSError, ValueError, KeyError):
            return _ask(member, "cluster")["members"]
    return []


def _ask(member, path):
    with _opener.open(f"http://{HOST}:{member.rest_port}/{path}", timeout=2) as answer:
        return json.load(answer)


def leader(layout):
    """Return the member that is the primary; raise ``ClusterError`` if there is none."""
    for state in members(layout):
        if state["role"] == "leader" and state["state"] == "running":
            return layout.member(state["name"])
    raise ClusterError("the cluster has no primary at present: wait for the election")


def switch_over(layout, candidate=None):
    """Let a standby take the place of the primary in good order; return Patroni's answer."""
    old = leader(layout)
    if candidate is not None:
        layout.member(candidate)  # raises if there is no such member
    wish = {"leader": old.name} | ({"candidate": candidate} if candidate else {})
    login = b64encode(f"patroni:{layout.passwords['patroni']}".encode()).decode()
    request = urllib.request.Request(
        f"http://{HOST}:{old.rest_port}/switchover",
        json.dumps(wish).encode(),
        {"Authorization": f"Basic {login}", "Content-Type": "application/json"},
    )
    try:
        with _opener.open(request, timeout=60) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        raise ClusterError(f"Patroni refuses: {error.read().decode()}") from None
    except OSError as error:
        raise ClusterError(f"the primary's Patroni does not answer: {error}") from None
