"""`DatabaseWrapper`: Django's backend for PostgreSQL, on connections that a task leases.

In a sync context everything is inherited: one connection a thread, kept as Django keeps it. In an
async context (green) the wrapper has no connection of its own: its first statement takes a lease
from the pool of the running loop, which ends with the cursor, or with the transaction. How that is
done stands in the parts that `wrapper` has; here they are put together with Django's other parts of
a backend, with the shortcuts (`fast`) and with the hooks that reach the rest of Django.
"""

from __future__ import annotations

from . import driver, hooks
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
# Django asks each wrapper at the beginning of each block whether it has the last of these, as that
# of SQLite does: nobody sets it.
DatabaseWrapper.own_names = names_of(DatabaseWrapper) | {"_start_transaction_under_autocommit"}
hooks.install()
