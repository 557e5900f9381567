"""Configures Sphinx, which makes the site out of these pages: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import pgbackend  # noqa: E402

project = "pgbackend"
author = "The pgbackend authors"
copyright = author  # noqa: A001 - Sphinx's name
version = release = pgbackend.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "repository_files",
    "drawings",
    "known_names",
]
exclude_patterns = ["_inventories"]
nitpicky = True
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]

# In the repository, so that the site is built without a network. `_inventories/README.md` says how
# each was made.
intersphinx_mapping = {
    name: (url, str(HERE / "_inventories" / f"{name}.inv"))
    for name, url in {
        "python": "https://docs.python.org/3/",
        "django": "https://docs.djangoproject.com/en/6.1/",
        "psycopg": "https://www.psycopg.org/psycopg3/docs/",
    }.items()
}
default_role = "code"  # in docstrings, one backtick marks code
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
#: Type variables and classes that users get from functions, and do not name.
nitpick_ignore_regex = [
    ("py:.*", r"(typing\.|pgbackend\.aio\.)?~?[TP]"),
    # Documented as django.http.HttpRequest and django.http.HttpResponse.
    ("py:class", r"django\.http\.(request|response)\.Http(Request|Response)"),
    # Without an inventory, or named by the type checkers only.
    ("py:class", r"(prometheus_client|opentelemetry)\..*"),
    ("py:class", r"pgbackend\.contrib\.prometheus\.PoolCollector"),
    ("py:class", r"pgbackend\.(declared\.SessionBlock|aio\.Detached|whole_stack\.GreenHandler)"),
]
autodoc_type_aliases = {"Hook": "pgbackend.metrics.Hook"}

html_theme = "furo"
html_title = f"pgbackend {version}"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_css_files = ["drawings.css", "site.css"]
html_show_sphinx = False
