# The door to the project: it makes a virtual environment and calls what does the work
# (python -m proj, pytest, nox). What may be set, on the command line or in the environment:
#
#   PYTHON=python3.13   the interpreter of a new environment   (default: the first that is new enough)
#   VENV=.venv-3.13     where the environment is               (default: .venv)
#   PORT=8123           where 'make demo' serves               (default: 8000)
#   DATABASE_URL=...    a PostgreSQL server to use             (default: one is started)
#   ARGS='-k pools'     what 'make test' tells pytest besides

VENV ?= .venv
RUN = $(VENV)/bin/python

NEW_ENOUGH = import sys; sys.exit(sys.version_info < (3, 11))
HAS_VENV = import ensurepip, venv
runs = $(if $(1),$(shell $(1) -c '$(2)' >/dev/null 2>&1 && echo yes))

ifndef PYTHON
# An environment that is there keeps its interpreter.
CANDIDATES = $(RUN) python3 python3.14 python3.13 python3.12 python3.11
PYTHON := $(shell for p in $(CANDIDATES); do $$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $$p && break; done)
MISSING = pgbackend needs Python 3.11 or later, and found none: install it, or name one with PYTHON=
else ifneq ($(wildcard $(VENV)),)
# Another interpreter was asked for than the environment has: it is made anew.
VERSION = import platform as p; print(p.python_implementation(), p.python_version())
ifneq ($(shell $(PYTHON) -c '$(VERSION)' 2>&1),$(shell $(RUN) -c '$(VERSION)' 2>&1))
STALE = stale
endif
endif
MISSING ?= pgbackend needs Python 3.11 or later: '$(PYTHON)' is not that
NO_VENV = $(PYTHON) cannot make virtual environments: install its module venv (Debian, Ubuntu: apt-get install python3-venv)
NO_BROWSER = 'make browser' needs root and Debian's or Ubuntu's apt-get: install Chromium and its chromedriver by other means
NO_HAPROXY = 'make cluster' and 'make scaleout' need HAProxy. As root on Debian or Ubuntu they install it: install it by other means
NO_PGBOUNCER = 'make pgbouncer' needs root and Debian's or Ubuntu's apt-get: install PgBouncer by other means
NO_NEWER = 'make pgbouncer-newer' needs root and Debian's apt-get: get PgBouncer 1.21 or later by other means, and name it with PGBOUNCER_NEWER=
NEWER = .pgbackend/pgbouncer-newer
NO_POSTGRESQL = 'make postgresql' and 'make postgis' need root and Debian's or Ubuntu's apt-get: install PostgreSQL (with PostGIS, and GDAL) by other means
NO_PIP = pip could not install what pgbackend needs: the lines above say why (is its package index reachable?)
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check

.PHONY: help demo cluster docs release test scaleout browser haproxy pgbouncer pgbouncer-newer postgresql postgis lint types imports suite clean stale

help:
	@echo 'make demo      serve the order desk at http://127.0.0.1:8000/ (PORT=); Ctrl-C ends it'
	@echo 'make cluster   serve it on a cluster: Patroni, HAProxy, PgBouncer (as root, Debian or Ubuntu, or'
	@echo '               with HAProxy and PgBouncer installed); Ctrl-C ends it'
	@echo 'make test      run the quick tests (ARGS= for pytest; ARGS=--slow runs all)'
	@echo 'make scaleout  take orders on such a cluster while its parts are killed; minutes'
	@echo 'make browser   install Chromium, for the tests of the pages (as root, Debian or Ubuntu)'
	@echo 'make pgbouncer install PgBouncer, for the tests through a pooler (as root, Debian or Ubuntu)'
	@echo 'make pgbouncer-newer unpack a later PgBouncer, for the same tests (as root, Debian)'
	@echo 'make postgresql install PostgreSQL with its extensions, make postgis with PostGIS and GDAL,'
	@echo "               for some of Django's own tests (as root, Debian or Ubuntu)"
	@echo 'make lint      ruff and codespell;  make types: mypy;  make imports: import-linter'
	@echo 'make docs      make the site of these pages, in build/docs'
	@echo 'make release   build sdist and wheel of the last commit, and check them, in dist'
	@echo "make suite     run Django's own tests on pgbackend; minutes"
	@echo 'make clean     remove the environment and what was built, and the data of the demo'

demo: $(VENV)/.installed-demo
	@$(RUN) -m proj

cluster: haproxy pgbouncer $(VENV)/.installed-cluster
	@$(RUN) -m proj.cluster

test: $(VENV)/.installed-test
	@$(RUN) -m pytest $(ARGS)

scaleout: haproxy pgbouncer $(VENV)/.installed-scaleout
	@$(RUN) -m pytest tests/scaleout -m scaleout --require-servers $(ARGS)

docs: $(VENV)/.installed-docs
	@$(RUN) -m sphinx --quiet --fresh-env --fail-on-warning --keep-going docs build/docs
	@echo 'The site is in build/docs: open build/docs/index.html'

release: $(VENV)/.installed-release
	@$(RUN) -m tests.release $(ARGS)

suite: $(VENV)/.installed-suite
	@$(RUN) -m tests.suite --parallel 2 $(ARGS)

lint: $(VENV)/.installed-lint
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(VENV)/bin/codespell

types: $(VENV)/.installed-lint
	@$(RUN) -m mypy

imports: $(VENV)/.installed-lint
	@$(VENV)/bin/lint-imports

browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y chromium chromium-driver; \
	else echo "$(NO_BROWSER)" >&2; exit 1; fi

haproxy:
	@if [ -x /usr/sbin/haproxy ] || command -v haproxy >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends haproxy; \
	else echo "$(NO_HAPROXY)" >&2; exit 1; fi

pgbouncer:
	@if [ -x /usr/sbin/pgbouncer ] || command -v pgbouncer >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y pgbouncer; \
	else echo "$(NO_PGBOUNCER)" >&2; exit 1; fi

pgbouncer-newer:
	@if [ -x $(NEWER)/bin/pgbouncer ] || [ -n "$$PGBOUNCER_NEWER" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		tests/support/newer_pgbouncer.sh $(NEWER); \
	else echo "$(NO_NEWER)" >&2; exit 1; fi

postgresql:
	@if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y postgresql; \
	else echo "$(NO_POSTGRESQL)" >&2; exit 1; fi

postgis:
	@if ls /usr/share/postgresql/*/extension/postgis_raster.control >/dev/null 2>&1 && command -v gdalinfo >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends postgresql postgresql-postgis postgresql-postgis-scripts gdal-bin; \
	else echo "$(NO_POSTGRESQL)" >&2; exit 1; fi

clean:
	rm -rf $(VENV) build dist var .pgbackend *.egg-info
	rm -rf .mypy_cache .nox .pytest_cache .ruff_cache .import_linter_cache

# One stamp for each of pyproject.toml's dependency groups. Naming groups needs pip 25.1, which few
# interpreters bring.
$(VENV)/.installed-%: pyproject.toml $(STALE)
	$(if $(call runs,$(PYTHON),$(NEW_ENOUGH)),,$(error $(MISSING)))
	$(if $(call runs,$(PYTHON),$(HAS_VENV)),,$(error $(NO_VENV)))
	@echo 'Installing into $(VENV), once and whenever pyproject.toml changes ...'
	@[ -z '$(STALE)' ] && $(RUN) -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) 'pip>=25.1' && $(PIP) --editable . --group $* || { echo '$(NO_PIP)' >&2; exit 1; }
	@touch $@
