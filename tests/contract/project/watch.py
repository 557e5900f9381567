"""Prints the statements of views that a tool sees: ``watch.py sentry``.

The output is a JSON object with the statements that the tool saw of an async view, of three
requests to that view together, of a sync view, of the async view under WSGI (with plain
`runserver`, too: it is the same application), and of an async view with a transaction.
"""

import asyncio
import json
import os
import sys
from wsgiref.util import setup_testing_defaults

os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"

TOOL = sys.argv[1]
os.environ["SHOP_TOOL"] = TOOL


def sentry():
    import sentry_sdk
    from sentry_sdk.integrations.django import DjangoIntegration
    from sentry_sdk.transport import Transport

    class Kept(Transport):
        def capture_envelope(self, envelope):
            if (event := envelope.get_transaction_event()) is not None:
                spans = [span for span in event["spans"] if span["op"] == "db"]
                seen.extend(span["description"] for span in spans)

    seen = []
    sentry_sdk.init(
        dsn="http://key@localhost/1",
        transport=Kept,
        traces_sample_rate=1.0,
        auto_enabling_integrations=False,
        integrations=[DjangoIntegration(db_transaction_spans=True)],
    )
    return seen


def opentelemetry():
    from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    class Kept(SpanProcessor):
        def on_end(self, span):
            seen.append(span.attributes["db.statement"])

    seen = []
    provider = TracerProvider()
    provider.add_span_processor(Kept())
    PsycopgInstrumentor().instrument(tracer_provider=provider)
    return seen


def toolbar():
    return []  # its modules have models: see `keep_panels`


def keep_panels():
    from debug_toolbar.panels.sql import SQLPanel

    generate_stats = SQLPanel.generate_stats

    def kept(self, request, response):
        generate_stats(self, request, response)
        queries = self.get_stats()["queries"]
        assert f"{len(queries)} quer" in self.nav_subtitle, self.nav_subtitle
        seen.extend(query["raw_sql"] for query in queries)

    SQLPanel.generate_stats = kept


def silk():
    return []


def silk_saw():
    from silk.models import SQLQuery

    queries = [query.query for query in SQLQuery.objects.order_by("start_time")]
    SQLQuery.objects.all().delete()
    return queries


seen = {"sentry": sentry, "opentelemetry": opentelemetry, "toolbar": toolbar, "silk": silk}[TOOL]()

import django  # noqa: E402

django.setup()
if TOOL == "toolbar":
    keep_panels()

from asgiref.testing import ApplicationCommunicator  # noqa: E402
from django.core.asgi import get_asgi_application  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402
from django.test.runner import DiscoverRunner  # noqa: E402
from shop.models import Product, Sale  # noqa: E402


def said():
    """Return the statements since the last call, without those that a tool adds for its own use."""
    statements = [*seen, *(silk_saw() if TOOL == "silk" else [])]
    seen.clear()
    return [each for each in statements if "shop_" in each or (TOOL, each) == ("sentry", "COMMIT")]


async def get(application, path):
    """Send a request as an ASGI server does."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
    }
    communicator = ApplicationCommunicator(application, scope)
    await communicator.send_input({"type": "http.request", "body": b"", "more_body": False})
    start = await communicator.receive_output(10)
    assert start["status"] == 200, start
    while (await communicator.receive_output(10)).get("more_body"):
        pass
    await communicator.wait(10)


def get_sync(path):
    """Send a request as a WSGI server does."""
    environ = {"PATH_INFO": path, "REMOTE_ADDR": "127.0.0.1"}
    setup_testing_defaults(environ)
    response = get_wsgi_application()(environ, lambda status, headers: None)
    list(response)
    response.close()


async def together(application):
    await asyncio.gather(*(get(application, "/page/") for _ in range(3)))


def main():
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        Sale.objects.create(product=Product.objects.create(name="tea"), number=1)
        application = get_asgi_application()
        said()
        answer = {}
        asyncio.run(get(application, "/page/"))
        answer["async"] = said()
        asyncio.run(together(application))
        answer["together"] = said()
        get_sync("/page/sync/")
        answer["sync"] = said()
        get_sync("/page/")
        answer["wsgi"] = said()
        asyncio.run(get(application, "/sell/tea/"))
        answer["block"] = said()
        print(json.dumps(answer))
    finally:
        runner.teardown_databases(databases)


main()
