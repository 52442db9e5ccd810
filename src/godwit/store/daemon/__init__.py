"""The embedded store daemon: etcd's JSON API, as far as Godwit uses it, on SQLite.

::

    connection ── gateway ── service ── engine            (event loop, memory)
                                │  ^
                         writer │  │ durable up to n      (one thread, SQLite, group commit)
                                v  │
                             database                     keys, change log, leases
"""
