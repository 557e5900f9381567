"""The parts of `DatabaseWrapper`, each a class that derives from the one below it.

From the bottom: `guards` refuses calls that would block a loop, `contexts` shows the state of the
running code, `connecting` sets up connections and their pools, `closing` closes a connection or
gives it back, `transactions` begins and ends transactions, and `cursors` opens cursors, each on a
connection that is leased for it. `pgbackend.base` adds Django's other parts and the shortcuts.

The parts are one class in six files: each overrides methods of Django's, calls ``super()``, and
may call the methods of all parts below it.
"""
