"""The owner record during one move: intent, commit, the swap, and the way back.

The swap is the one irrevocable step of a move: a single transaction by the source that compares
the owner's revision and the presence of the destination's lease. Everything here is written so
that at any instant exactly one answer to "who may run it" can be read from the store:

- before the swap is known to have succeeded, only a transaction that changes the revision
  (``roll_back``) entitles the source to go on, because it makes a late swap fail;
- when an answer is lost, the record is read until it answers: our own id with the destination as
  host means it had succeeded; still the source means it had not;
- anything else means the record was changed by a third hand: neither copy may run.
"""

from __future__ import annotations

from enum import StrEnum

from godwit.model import keys, ownership
from godwit.model.errors import Conflict, GodwitError, Unavailable
from godwit.model.ownership import MoveIntent, Owner
from godwit.model.world import Clock
from godwit.store.api import Compare, Op, delete, exists, put
from godwit.store.errors import StoreError, StoreOutcomeUnknown
from godwit.store.records import CasFailed, Records, encode

_RETRY_S = 0.1


class Verdict(StrEnum):
    """Whose the VM is, as far as the move is concerned."""

    SOURCE = "source"
    DESTINATION = "destination"
    NEITHER = "neither"


def judge(owner: Owner | None, intent: MoveIntent, *, epoch: int) -> Verdict:
    """Read the record as the source of ``intent``, which began at ``epoch``. Pure."""
    if owner is None:
        return Verdict.NEITHER
    if owner.host == intent.source and owner.epoch == epoch:
        return Verdict.SOURCE
    mine = owner.migration is None or owner.migration.id == intent.id
    if owner.host == intent.destination and owner.epoch == epoch + 1 and mine:
        return Verdict.DESTINATION
    if owner.host == intent.source and owner.epoch == epoch + 2 and owner.migration is None:
        return Verdict.SOURCE  # a gift: the destination returned what it never started
    return Verdict.NEITHER


class OwnerLink:
    """One VM's owner record as seen by the source of one move.

    Holds the value and revision last read or written; every write compares that revision.
    """

    def __init__(self, records: Records, clock: Clock, *, vm: str, intent: MoveIntent) -> None:
        self._records = records
        self._clock = clock
        self._key = keys.vm_owner(vm)
        self._vm = vm
        self.intent = intent
        self.owner = Owner()
        self.revision = 0
        self.epoch = 0
        self.verdict = Verdict.SOURCE  # of the last reading
        self.refusal = ""
        self.bound = False  # our intent is, or may be, in the record
        self._begin_unknown = False

    async def begin(self, *, memory_bytes: int, timeout: float) -> Owner:
        """Write the intent and reserve memory on the destination, in one transaction.

        Refused or Conflict when the VM is not free to move; Unavailable when the store is away.
        """
        try:
            found = await self._records.owner(self._vm, timeout=timeout)
        except StoreError as error:
            raise _away(error) from error
        if found is None:
            raise Conflict(f"{self._vm} has no owner record", hint="was it deleted?")
        after = ownership.begin_move(found.value, self.intent)
        self.owner, self.revision, self.epoch = found.value, found.revision, found.value.epoch
        reservation = put(self._reservation, str(memory_bytes).encode())
        try:
            await self._write(after, also=[reservation], timeout=timeout)
        except CasFailed:
            raise Conflict(
                f"{self._vm} was changed by somebody else at this moment", hint="ask again"
            ) from None
        except StoreOutcomeUnknown as error:
            self.bound = self._begin_unknown = True
            raise Unavailable(
                f"the store did not answer in time: {error}", hint="the move is called off"
            ) from error
        except StoreError as error:
            raise _away(error) from error
        self.bound = True
        return found.value

    async def adopt(self) -> Verdict:
        """After an agent's restart: take the record as it stands; waits for the store."""
        self.bound = True
        await self.settle()
        swapped = self.owner.host == self.intent.destination
        self.epoch = self.owner.epoch - (1 if swapped else 0)
        return await self.settle()

    async def commit(self, *, timeout: float) -> None:
        """Record COMMITTING: also the linearizable proof that the record is still ours.

        Any failure (CasFailed, StoreError) means: do not go on.
        """
        await self._write(ownership.committing(self.owner, self.intent.id), timeout=timeout)

    async def swap(self, *, postcopy: bool = False, timeout: float) -> Verdict:
        """Hand the VM to the destination. Waits for the store as long as it takes.

        Where the verdict is SOURCE, ``refusal`` says why.
        """
        after = ownership.swap(self.owner, self.intent.id, postcopy=postcopy)
        try:
            await self._write(
                after,
                compare=[exists(keys.host_lease(self.intent.destination))],
                also=[delete(self._reservation)],
                timeout=timeout,
            )
        except CasFailed:
            self.refusal = f"{self.intent.destination} has no lease"
            return await self.settle()
        except StoreError as error:
            self.refusal = f"it did not answer in time ({error})"
            return await self.settle()
        return Verdict.DESTINATION

    async def settle(self) -> Verdict:
        """Read linearizably until the store answers, and judge."""
        while True:
            try:
                found = await self._records.owner(self._vm)
            except StoreError:
                # No event tells that a store is back; the client itself reconnects.
                await self._clock.sleep(_RETRY_S)
                continue
            if found is not None:
                self.owner, self.revision = found.value, found.revision
            self.verdict = judge(found.value if found else None, self.intent, epoch=self.epoch)
            return self.verdict

    async def roll_back(self) -> Verdict:
        """Take the intent out of the record, so that a late swap fails; waits for the store.

        SOURCE: done, the source may run. DESTINATION: the swap had succeeded after all.
        """
        while True:
            verdict = await self.settle()
            if verdict is not Verdict.SOURCE:
                return verdict
            move = self.owner.migration
            if move is not None and move.id != self.intent.id:
                return verdict  # a later move of the same owner; ours is long gone
            if move is None and not self._begin_unknown:
                return verdict
            # An intent lost on its way may still arrive: any write here makes it fail.
            free = ownership.rolled_back(self.owner, self.intent.id) if move else self.owner
            try:
                await self._write(free, also=[delete(self._reservation)])
            except (CasFailed, StoreError):
                await self._clock.sleep(_RETRY_S)
                continue
            return Verdict.SOURCE

    async def finish(self, *, also: tuple[Op, ...] = ()) -> None:
        """The destination runs and the source is clean: free the record. Waits for the store."""
        while True:
            # What was read or written last first: nobody else has a reason to write meanwhile.
            if self.owner.migration is None or self.owner.migration.id != self.intent.id:
                return
            try:
                await self._write(ownership.finished(self.owner, self.intent.id), also=also)
            except CasFailed:
                await self.settle()
            except StoreError:
                await self._clock.sleep(_RETRY_S)
                await self.settle()
            else:
                return

    @property
    def _reservation(self) -> str:
        return keys.host_reservation(self.intent.destination, self._vm)

    async def _write(
        self,
        value: Owner,
        *,
        compare: list[Compare] | None = None,
        also: list[Op] | tuple[Op, ...] = (),
        timeout: float | None = None,
    ) -> None:
        self.revision = await self._records.cas(
            self._key, value, self.revision, compare=compare or (), also=also, timeout=timeout
        )
        self.owner = value


def _away(error: StoreError) -> GodwitError:
    return Unavailable(f"the store does not answer: {error}", hint="nothing was changed; try later")


def status_put(vm: str, status: bytes) -> Op:
    """The VM's status as part of a transaction."""
    return put(keys.vm_status(vm), status)


__all__ = ["OwnerLink", "Verdict", "encode", "judge", "status_put"]
