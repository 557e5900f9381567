"""Shows the cluster, and lets one switch over, or kill and start members."""

import asyncio

from django.conf import settings
from django.http import Http404, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from proj.cluster import rest, steering
from proj.cluster.layout import Layout
from proj.cluster.programs import ClusterError
from proj.cluster.topology import topology


@require_safe
async def page(request):
    return await _render(request)


@require_safe
async def as_json(request):
    return JsonResponse(await topology(settings.CLUSTER_HOME))


@require_POST
async def act(request, what):
    """Do what a button of the page says; answer when it is done."""
    if what not in _ACTS:
        raise Http404(f"the cluster knows no {what!r}")
    if not (settings.KITCHEN_RUSH_OPEN or request.user.is_staff):
        return await _render(request, "Sign in as staff to steer the cluster.", status=403)
    try:
        await asyncio.to_thread(_ACTS[what], settings.CLUSTER_HOME, request.POST.get("member"))
    except (ClusterError, KeyError) as error:
        return await _render(request, error.args[0], status=409)
    return redirect("cluster:page")


async def _render(request, problem="", status=200):
    context = {"now": await topology(settings.CLUSTER_HOME), "problem": problem}
    return render(request, "cluster/cluster.html", context, status=status)


def _switch_over(home, member):
    rest.switch_over(Layout.read(home), member or None)


def _kill(home, member):
    steering.order(home, "kill", name=member or rest.leader(Layout.read(home)).name)


def _start(home, member):
    steering.order(home, "start", name=member)


_ACTS = {"switchover": _switch_over, "kill": _kill, "start": _start}
