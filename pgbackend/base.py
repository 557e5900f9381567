"""`DatabaseWrapper`: Django's backend for PostgreSQL, on connections that a task leases.

In sync code it works as in Django: each thread has one connection. In green code the wrapper has no
connection of its own: a statement leases one from the pool of the running loop, and the lease ends
with the cursor, or with the transaction. The code is in the classes of `wrapper/`. This module
joins these with Django's other parts of a backend, plugs the shortcuts (`fast`) in, and installs
the hooks, which replace functions in the rest of Django.
"""

from __future__ import annotations

from . import driver, dump_signal, hooks
from .attributes import names_of
from .client import DatabaseClient
from .creation import DatabaseCreation
from .fast.install import install as install_shortcuts
from .features import DatabaseFeatures
from .introspection import DatabaseIntrospection
from .operations import DatabaseOperations
from .schema import DatabaseSchemaEditor
from .wrapper.cursors import Cursors


class DatabaseWrapper(Cursors):
    Database = driver
    SchemaEditorClass = DatabaseSchemaEditor
    client_class = DatabaseClient
    creation_class = DatabaseCreation
    features_class = DatabaseFeatures
    introspection_class = DatabaseIntrospection
    ops_class = DatabaseOperations


install_shortcuts()
# The last name is a method of SQLite's wrapper, for which `Atomic` asks every wrapper: nobody sets
# it on this one.
DatabaseWrapper.own_names = names_of(DatabaseWrapper) | {"_start_transaction_under_autocommit"}
hooks.install()
dump_signal.install()
