"""How long a member of etcd waits for its disk, read out of its own metrics. Pure.

etcd counts each fsync of its log in ``etcd_disk_wal_fsync_duration_seconds``, a histogram since its
start (seen on 3.4.23; its own guide names this metric and 10 ms for the 99th percentile).
"""

from __future__ import annotations

import re

_BUCKET = re.compile(
    r'^etcd_disk_wal_fsync_duration_seconds_bucket\{le="([^"]+)"\}\s+([0-9.e+]+)\s*$', re.MULTILINE
)
_FEWEST = 200


def fsync_p99_s(metrics: str) -> float | None:
    """The upper bound, in seconds, of the bucket that holds the 99th percentile.

    None when there are no such figures, or so few that a percentile of them says nothing. Beyond
    the last bound it is infinite.
    """
    counts = sorted((float(bound), float(count)) for bound, count in _BUCKET.findall(metrics))
    if not counts or counts[-1][1] < _FEWEST:
        return None
    wanted = 0.99 * counts[-1][1]
    return next(bound for bound, count in counts if count >= wanted)
