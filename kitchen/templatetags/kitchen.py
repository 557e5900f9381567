"""Formats money and time as the desk writes them."""

from django import template
from django.utils import timezone
from django.utils.html import format_html

register = template.Library()


@register.filter
def money(amount):
    return f"€ {amount:.2f}"


@register.filter
def seconds_old(moment):
    """Return whole seconds since ``moment``, from which the page counts on with its own clock."""
    return max(0, int((timezone.now() - moment).total_seconds()))


@register.simple_tag
def age(moment):
    """Format ``moment`` as a time element: minutes and seconds ago, which the script updates."""
    seconds = seconds_old(moment)
    return format_html(
        '<time datetime="{}" data-age="{}">{}</time>', moment.isoformat(), seconds, clock(seconds)
    )


@register.filter
def clock(seconds):
    """Format seconds as ``4:05``, or ``1:04:05`` from an hour on."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@register.filter
def took(order):
    """Format how long a served order took, from the guest's word to the table."""
    return clock(max(0, int((order.changed_at - order.created_at).total_seconds())))


@register.filter
def is_late(order):
    promised = order.promised_minutes
    return promised is not None and seconds_old(order.created_at) > promised * 60
