"""What the demonstration shows of a VM: it boots, moves while it is being asked, and stays.

What is claimed is looked at: where the VM runs, whether it answers, whether it was ever restarted.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeGuard, TypeVar

from godwit.client.sync import Client
from godwit.host.netns import opened_netns, socket_in_netns
from godwit.lab.demo_stage import Stage
from godwit.lab.layout import CLIENT, LAN, Layout
from godwit.lab.picture import NOT_ASKED, column_ms, draw, longest_gap
from godwit.lab.probe import ECHO_PORT, Samples
from godwit.model.errors import Cancelled, OperationFailed, Refused
from godwit.model.migration import Migration, Outcome
from godwit.model.migration import Stage as MoveStage
from godwit.model.task import Task, TaskState
from godwit.model.units import format_duration

T = TypeVar("T")
News = Task | Migration | Exception

VM = "web"
NUMBER = 100  # of its address on the VM network
WELL_IN = 30.0  # percent; a command to cancel takes a while to start
_BOOT_S = 90.0
_BACK_S = 10.0  # at most, until it answers after a move
_AFTER_S = 0.3
_NEWS_S = 60.0
_PROBE_S = 60  # the longest that a probe runs, should nobody end it
_CONTROL_PORT = 7777
_WRITE_MB_S = 300  # more than twice what the wire carries
_WRITE_MIB = 150
_TRIES = 4
_BUSY = 2.0  # load per processor, beyond what the demonstration itself makes


@dataclass(frozen=True, slots=True)
class Shown:
    """One finished move, for the summary."""

    move: Migration
    probe_ms: float


class Moves:
    """Steps of the demonstration, in their order. ``close`` ends the connection."""

    def __init__(self, stage: Stage, lab: str, home: Path) -> None:
        self._stage = stage
        self._lab = lab
        self._home = home
        self._netns = Layout(lab, 2).netns(CLIENT)
        self._address = LAN.address(NUMBER)
        self._cidr = LAN.cidr(NUMBER)
        self._opened: Client | None = None
        self._answered_at = 0.0
        self._probes = 0
        self._shown: list[Shown] = []

    def close(self) -> None:
        """Close the connection to the lab's manager."""
        if self._opened is not None:
            self._opened.close()

    @property
    def _client(self) -> Client:
        if self._opened is None:
            self._opened = Client(context=self._lab, name="demo/0.1")
        return self._opened

    # The steps

    def boot(self) -> None:
        """Create and start the VM; it is up when it answers on its network."""
        stage = self._stage
        stage.heading("A VM on the first host")
        append = f"godwit.ip={self._cidr} godwit.host={VM}"
        stage.godwit(
            "vm", "create", VM, "--image", "demo", "--memory", "256M", "--network", LAN.name,
            "--append", append,
        )  # fmt: skip
        stage.godwit("vm", "start", VM, "--host", "host1")
        start = time.monotonic()
        self._until_answer(_BOOT_S)
        self._answered_at = time.monotonic()
        stage.ok(f"{VM} answers on the network {self._answered_at - start:.1f} s after it started")
        stage.godwit("vm", "list")

    def live(self) -> None:
        """There and back while it runs."""
        stage = self._stage
        stage.heading("Live: it moves while it runs")
        stage.say(f"A probe on the network asks {VM} a thousand times a second and counts answers.")
        self._move("host2", "live")
        stage.say("\nAnd back:")
        self._move("host1", "live")

    def quick(self) -> None:
        """There and back through a file."""
        stage = self._stage
        stage.heading("Quick: it is saved, handed over and restored")
        stage.say(
            f"Its memory goes through a file that both hosts see. {VM} stands still for longer."
        )
        self._move("host2", "quick")
        stage.say("\nAnd back:")
        self._move("host1", "quick")

    def cancelled(self) -> None:
        """A move that is called off half-way."""
        stage = self._stage
        stage.heading("Cancelled half-way: the VM stays where it is")
        stage.say(
            f"{VM} now writes {_WRITE_MIB} MiB of its memory over and over: the move takes longer."
        )
        self._make_it_write()
        here, there = "host1", "host2"
        for _ in range(_TRIES):
            with self._probing() as samples:
                words = ("vm", "migrate", VM, "--to", there, "--no-wait")
                task = stage.godwit(*words, output="keep", progress=False).strip()
                cancelled = self._cancel_half_way(task)
            if cancelled:
                break
            # A busy machine may start our command too late.
            stage.say(f"\nThe move was quicker: {VM} runs on {there}. Once more, back:")
            here, there = there, here
        else:
            raise OperationFailed("each move was over before it could be cancelled")
        stage.godwit("vm", "list")
        self._must_run_on(here)
        self._show_probe(samples())

    def summary(self) -> None:
        """All moves in one table, and how long the guest has been up."""
        stage = self._stage
        stage.heading("What was seen")
        stage.say("move                   took   dark by Godwit   dark by the probe")
        for one in self._shown:
            move = one.move
            total, dark = _ms(move.total_ms), _ms(move.blackout_ms)
            stage.say(
                f"{move.method:<6} {move.source} → {move.destination}  {total:>7}"
                f"  {dark:>15}  {_ms(one.probe_ms):>18}"
            )
        load, processors = os.getloadavg()[0], os.cpu_count() or 1
        if load > _BUSY * processors:
            stage.say(
                f"This machine is busy (load {load:.1f} on {processors} processors): it shows."
            )
        uptime_s = float(self._guest_stats()["uptime_s"])
        if uptime_s < time.monotonic() - self._answered_at:
            raise OperationFailed(f"{VM} was restarted: it is up for {uptime_s:.1f} s only")
        stage.ok(f"{VM} is up for {format_duration(uptime_s)}: it was never restarted")

    def script(self) -> None:
        """The same move as a program."""
        self._stage.heading("Each action is also a script")
        self._stage.godwit("vm", "migrate", VM, "--to", "host2", "--script", "python")

    # Moving

    def _move(self, to: str, method: Literal["live", "quick"]) -> None:
        how = () if method == "live" else ("--method", method)
        with self._probing() as samples:
            self._stage.godwit("vm", "migrate", VM, "--to", to, *how)
        self._must_run_on(to)
        moves = [move for move in self._client.migrations.list() if move.vm == VM]
        move = max(moves, key=lambda move: move.accepted_at)
        if move.outcome is not Outcome.COMPLETED or move.destination != to:
            raise OperationFailed(f"the move to {to} is {move.state.value}: {move.reason}")
        seen_ms = self._show_probe(samples(), move.blackout_ms)
        self._shown.append(Shown(move, seen_ms))

    def _must_run_on(self, host: str) -> None:
        seen = self._client.vms.get(VM)
        if seen.state.value != "running" or seen.host != host:
            raise OperationFailed(f"{VM} is {seen.state.value} on {seen.host}, not on {host}")

    def _make_it_write(self) -> None:
        said = f"echo dirty rate={_WRITE_MB_S} mib={_WRITE_MIB}"
        shell = f"{said} > /dev/udp/{self._address}/{_CONTROL_PORT}"
        for _ in range(_TRIES):
            words = ("lab", "exec", "--name", self._lab, CLIENT, "--", "bash", "-c", shell)
            self._stage.godwit(*words)
            # A datagram may get lost; and an idle guest's move would be over too soon.
            if self._guest_stats()["dirty"]["wanted_mb_s"] == _WRITE_MB_S:
                return
        raise OperationFailed(f"{VM} does not obey on its control port")

    def _cancel_half_way(self, task_id: str) -> bool:
        """Call the move off while memory is copied; False when it was over before that."""
        news: SimpleQueue[News] = SimpleQueue()

        def watch() -> None:
            try:
                news.put(self._client.wait(task_id, on_progress=news.put))
            except Exception as error:  # whatever it is, the main thread tells it
                news.put(error)

        # A daemon: it must not hold us up when we are interrupted.
        threading.Thread(target=watch, name="watch the move", daemon=True).start()
        one = _next(news, _is_half_way)
        if not isinstance(one, Migration):
            return False
        said = f"{one.progress.percent:.0f} % of {one.progress.stage.value}"
        self._stage.ok(f"the move is under way: {said}")
        try:
            self._stage.godwit("migration", "cancel", one.id, progress=False)
        except OperationFailed as error:
            if error.context.get("code") != Refused.exit_code:
                raise
        end = _next(news, _is_over)
        return isinstance(end, Cancelled) or end.state is TaskState.CANCELLED

    # The probe

    @contextlib.contextmanager
    def _probing(self) -> Iterator[Callable[[], Samples]]:
        """Probe for as long; then what was seen can be had."""
        self._probes += 1
        file = f"probe-{self._probes}"
        words = ("lab", "probe", "--name", self._lab, self._address)
        probe = self._stage.beside(*words, "--seconds", str(_PROBE_S), "--save", file)
        yield lambda: Samples.load(self._home / file)
        self._until_answer(_BACK_S)
        time.sleep(_AFTER_S)  # what the picture shows of the time after
        probe.stop()

    def _show_probe(self, samples: Samples, measured_ms: float | None = None) -> float:
        """The picture and the figures; for how long nothing was answered."""
        stage = self._stage
        sent = [at for at in samples.sent if at]
        lost = len(sent) - sum(1 for at in samples.arrived if at)
        gap = longest_gap(samples)
        gap_ms = gap.ms if gap else 0.0
        strip, *below = draw(samples)
        missed = "  blank: not asked" if NOT_ASKED in strip.strip() else ""
        stage.say(
            f"\n  The probe, {column_ms(samples):.3g} ms a column:"
            f"  █ answered  · not answered{missed}\n"
        )
        stage.picture((strip, *below))
        asked = f"{lost:,} of {len(sent):,} questions lost"
        if lost == 0:
            asked = f"all {len(sent):,} questions answered"
        by_godwit = "" if measured_ms is None else f"{_ms(measured_ms)} by Godwit, "
        stage.say(f"\n  Dark: {by_godwit}{_ms(gap_ms)} by the probe ({asked}).")
        return gap_ms

    # Asking the guest

    def _until_answer(self, limit_s: float) -> None:
        with self._channel(ECHO_PORT) as channel:
            channel.settimeout(0.1)
            until = time.monotonic() + limit_s
            while time.monotonic() < until:
                with contextlib.suppress(OSError):
                    channel.send(b"up?")
                    channel.recv(16)
                    return
        raise OperationFailed(
            f"{VM} has not answered on its network for {limit_s:.0f} s",
            hint="its console is among the logs of its host",
        )

    def _guest_stats(self) -> dict[str, Any]:
        with self._channel(_CONTROL_PORT) as channel:
            channel.settimeout(1.0)
            for _ in range(10):
                with contextlib.suppress(TimeoutError, ConnectionError):
                    channel.send(b"stats")
                    stats: dict[str, Any] = json.loads(channel.recv(8192))["stats"]
                    return stats
        raise OperationFailed(f"{VM} does not answer on its control port")

    def _channel(self, port: int) -> socket.socket:
        with opened_netns(self._netns) as descriptor:
            channel = socket_in_netns(descriptor, kind=socket.SOCK_DGRAM)
        channel.connect((self._address, port))
        return channel


def _is_over(one: News) -> TypeGuard[Task | Cancelled]:
    """The event and the answer to the held request race: a cancelled task is raised, too."""
    ended = (TaskState.CANCELLED, TaskState.COMPLETED)
    return isinstance(one, Cancelled) or (isinstance(one, Task) and one.state in ended)


def _is_half_way(one: News) -> TypeGuard[Migration | Task | Cancelled]:
    """Well in pre-copy; or over, when nothing of that was heard."""
    if not isinstance(one, Migration):
        return _is_over(one)
    now = one.progress
    return now.stage is MoveStage.PRECOPY and now.percent >= WELL_IN


def _next(news: SimpleQueue[News], wanted: Callable[[News], TypeGuard[T]]) -> T:
    """The first piece of news that is wanted; OperationFailed when none comes."""
    until = time.monotonic() + _NEWS_S
    with contextlib.suppress(Empty):
        while True:
            one = news.get(timeout=max(0.0, until - time.monotonic()))
            if wanted(one):
                return one
            if isinstance(one, Exception):
                raise OperationFailed(f"the move that was to be cancelled failed: {one}")
    raise OperationFailed(f"nothing was heard of the move for {_NEWS_S:.0f} s")


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else format_duration(milliseconds / 1000)
