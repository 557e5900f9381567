"""The parts of `DatabaseWrapper`, each a class that derives from the one below it.

From the bottom: `guards` refuses calls that would block a loop, `contexts` shows the state of the
running code, `connecting` prepares connections and their pools, `leasing` takes a connection for
the running code, `closing` lets it go, `transactions` begins and ends transactions on it, and
`cursors` opens cursors. `pgbackend.base` puts Django's other parts and the shortcuts to them.

They are one class in seven files: a part overrides methods of Django's and calls ``super()``, and
may call all that the parts below it have.
"""
