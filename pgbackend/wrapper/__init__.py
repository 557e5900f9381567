"""The parts of `DatabaseWrapper`, each a class that derives from the one below it.

From the bottom: `guards` refuses calls that would block a loop, `contexts` shows the state of the
running code, `connecting` sets up connections and their pools, `leasing` takes a connection for the
running code, `closing` gives it back, `transactions` begins and ends transactions on it, and
`cursors` opens cursors. `pgbackend.base` adds Django's other parts and the shortcuts.

The parts are one class in seven files: each overrides methods of Django's, calls ``super()``, and
may call the methods of all parts below it.
"""
