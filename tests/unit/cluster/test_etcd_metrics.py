"""etcd's own figures for its disk, as its 3.4.23 prints them."""

from __future__ import annotations

import math

import pytest

from godwit.cluster.validation.etcd_metrics import fsync_p99_s

BOUNDS = ("0.001", "0.002", "0.004", "0.008", "0.016", "+Inf")
NAME = "etcd_disk_wal_fsync_duration_seconds"


def metrics(*counts: int) -> str:
    lines = [
        f"# HELP {NAME} The latency distributions of fsync called by WAL.",
        f"# TYPE {NAME} histogram",
        'etcd_disk_backend_commit_duration_seconds_bucket{le="0.001"} 900000',
    ]
    lines += [
        f'{NAME}_bucket{{le="{bound}"}} {count}'
        for bound, count in zip(BOUNDS, counts, strict=True)
    ]
    return "\n".join([*lines, f"{NAME}_sum 0.005227", f"{NAME}_count {counts[-1]}", ""])


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1000, 1000, 1000, 1000, 1000, 1000), 0.001),
        ((900, 950, 980, 990, 1000, 1000), 0.008),
        ((900, 950, 980, 989, 1000, 1000), 0.016),
        ((0, 0, 0, 0, 0, 1000), math.inf),
    ],
)
def test_the_99th_percentile_is_the_bound_of_its_bucket(
    counts: tuple[int, ...], expected: float
) -> None:
    assert fsync_p99_s(metrics(*counts)) == expected


def test_few_figures_and_none_say_nothing() -> None:
    assert fsync_p99_s(metrics(90, 90, 90, 199, 199, 199)) is None
    assert fsync_p99_s("") is None


def test_large_counts_are_read_as_etcd_writes_them() -> None:
    text = metrics(1, 1, 1, 1, 1, 1).replace("} 1\n", "} 1.234567e+06\n")
    assert fsync_p99_s(text) == 0.001
