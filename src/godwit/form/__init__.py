"""Form a cluster: make the first host, let others join, carry a store's whole content over.

What runs here runs once, by hand, as root on a host; nothing of it stays running.
"""
