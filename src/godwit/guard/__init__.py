"""The watchman: a small process that keeps this host's promises when its agent cannot.

It renews the host's lease (so an agent's restart never costs one), stops highly available VMs at
the deadline when it cannot (``deadline``, ``keeper``), feeds the machine's watchdog, and holds a
second, already out-of-band-negotiated monitor per VM, through which it cancels or yanks a move
whose agent died or hung while the VM was dark. It decides nothing else and starts nothing.
"""
