"""What can go wrong with a power device, grouped by what it says about the host.

PowerUnavailable     nothing was switched: the device does not answer, or was not asked
└── PowerNotTrusted  another certificate than the one we were told
PowerDenied          the device answers and does not let us
PowerFailed          the device answers and cannot, or makes no sense
PowerNotConfirmed    asked for, and the device did not say in time that it happened: no proof
"""

from __future__ import annotations

from godwit.model.errors import OperationFailed, OutcomeUnknown, Unavailable


class PowerUnavailable(Unavailable):
    """The device does not answer; nothing was switched by us."""


class PowerNotTrusted(PowerUnavailable):
    """The device's certificate is not the one expected; nothing was sent, above all no password."""


class PowerDenied(OperationFailed):
    """The device does not accept user and password, or not for this."""


class PowerFailed(OperationFailed):
    """The device answered that it cannot, or with something that makes no sense."""


class PowerNotConfirmed(OutcomeUnknown):
    """The device was asked, and did not say in time that it is so: the host may run or not."""


def scrubbed(text: str, secret: str) -> str:
    """A text of somebody else's without the secret, on one line."""
    plain = " ".join(text.split())
    return plain.replace(secret, "***") if secret else plain
