"""The heart: moving a running VM to another host.

Pure floors: ``plan`` (may it move), ``forecast`` (what to expect), ``policy`` (what to do while it
moves), ``timeline`` (what it looked like), ``recover`` (what a restarted agent does). Acting:
``source`` drives, ``destination`` answers, ``handover`` holds the one irrevocable step, ``quick``
and ``postcopy`` are the other two ways. ``docs/design/0002`` has the order and the failure table.
"""
