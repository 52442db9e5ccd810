"""The manager: decides, queues, records and serves people. It touches no host itself.

Moves and running VMs do not need it: agents finish what they began, and a manager that starts
again reads the records and goes on from there.
"""
