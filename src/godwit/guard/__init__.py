"""The watchman: a small process that keeps this host's promises when its agent cannot.

It renews the host's lease (so an agent's restart never costs one) and holds a second, already
out-of-band-negotiated monitor per VM, through which it cancels or yanks a move whose agent died or
hung while the VM was dark. It decides nothing else and starts nothing.
"""
