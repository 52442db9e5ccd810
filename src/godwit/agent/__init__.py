"""The per-host daemon: owns this host's QEMUs, serves the manager and its peers.

Rooms: ``main`` (start and end), ``app`` (who may ask what), ``desk`` (the VMs of this host),
``power`` (start, stop, pause, save), ``departures`` and ``arrivals`` (the
engine's two sides), ``adopt`` (after a restart),
``facts``, ``files``, ``networks``, ``guardlink``, ``peering``, ``gate``, ``holds``, ``console``.
"""
