"""Where each record lies in the store. One place, so that a listing is always one prefix."""

from __future__ import annotations

ROOT = "/godwit/"
VMS = ROOT + "vms/"
HOSTS = ROOT + "hosts/"
NETWORKS = ROOT + "networks/"
VOLUMES = ROOT + "volumes/"
VOLUME_STATES = ROOT + "volume-states/"  # beside the volumes, so that a list of them is clean
MIGRATIONS = ROOT + "migrations/"
TASKS = ROOT + "tasks/"
EVENTS = ROOT + "events/"
SECRETS = ROOT + "secrets/"  # handed in, sealed, not yet used; each under a lease of minutes
LEADER = ROOT + "manager/leader"
QUEUE = ROOT + "manager/queue"  # the move that had its turn last; see manager.work.queueing
CLUSTER = ROOT + "cluster"
VALIDATION = ROOT + "validation/last"  # the report of the last one (``ValidationReport``)
VALIDATION_TRY = ROOT + "validation/try"  # written to see how long a write takes
TRUST = ROOT + "trust/"  # who belongs to the cluster: godwit.model.trust
TRUST_CLUSTER = TRUST + "cluster"  # ``ClusterIdentity``
TRUST_CRL = TRUST + "crl"  # the newest list of revoked certificates, as PEM
TRUST_CRL_MIGRATION = TRUST_CRL + "-migration"  # the same of QEMU's certificates, of their own CA
TRUST_TOKENS = TRUST + "tokens/"
TRUST_ISSUED = TRUST + "issued/"
TRUST_ASKED = TRUST + "asked/"
TRUST_RENEWED = TRUST + "renewed/"
RESTORING = ROOT + "restoring"  # present while a backup is being written into this store


def vm_spec(name: str) -> str:
    """The definition of a VM (``Vm``)."""
    return f"{VMS}{name}/spec"


def vm_owner(name: str) -> str:
    """The ownership record (``Owner``): the one place that says who may run the VM."""
    return f"{VMS}{name}/owner"


def vm_status(name: str) -> str:
    """What the owner's agent last saw (``VmStatus``); never a proof of anything."""
    return f"{VMS}{name}/status"


def vm_restarts(name: str) -> str:
    """When failovers started the VM lately (``Restarts``)."""
    return f"{VMS}{name}/restarts"


def host_info(name: str) -> str:
    """Facts and addresses the agent published (``HostInfo``)."""
    return f"{HOSTS}{name}/info"


def host_lease(name: str) -> str:
    """Present while the host's guard renews its lease."""
    return f"{HOSTS}{name}/lease"


def host_renewal(name: str) -> str:
    """What the host's guard wrote with its last renewal (``Renewal``); it outlives the lease."""
    return f"{HOSTS}{name}/renewal"


def is_renewal(key: str) -> bool:
    """Whether this is some host's renewal: true of the store it was written to, and of no copy."""
    return key.startswith(HOSTS) and key.endswith("/renewal")


def host_agent(name: str) -> str:
    """Present while the host's agent lives (leased too); absent means ``unmanaged``."""
    return f"{HOSTS}{name}/agent"


def host_confirmed_down(name: str) -> str:
    """An administrator's word that a host is off (``ConfirmedDown``)."""
    return f"{HOSTS}{name}/confirmed-down"


def host_power(name: str) -> str:
    """How its power is switched (``PowerConfig``), with the password sealed."""
    return f"{HOSTS}{name}/power"


def host_mark(name: str) -> str:
    """Why a host takes no new VMs (``HostMark``); absent when it does."""
    return f"{HOSTS}{name}/mark"


def host_validated(name: str) -> str:
    """That a host's network and system were checked and nothing failed (``HostValidated``)."""
    return f"{HOSTS}{name}/validated"


def host_reservation(name: str, vm: str) -> str:
    """Memory set aside on a host for an incoming VM."""
    return f"{HOSTS}{name}/reservations/{vm}"


def network(name: str) -> str:
    """A VM network (``Network``)."""
    return f"{NETWORKS}{name}"


def volume(name: str) -> str:
    """A shared volume (``Volume``)."""
    return f"{VOLUMES}{name}"


def volume_state(name: str, host: str) -> str:
    """What a host's agent last saw of a volume (``VolumeOnHost``)."""
    return f"{VOLUME_STATES}{name}/{host}"


def migration(migration_id: str) -> str:
    """A move: request, progress and report (``Migration``)."""
    return f"{MIGRATIONS}{migration_id}"


def task(task_id: str) -> str:
    """A long piece of work somebody asked for (``Task``)."""
    return f"{TASKS}{task_id}"


def event(event_id: str) -> str:
    """One line of the event log (``Event``); ids sort by time."""
    return f"{EVENTS}{event_id}"


def secret(secret_id: str) -> str:
    """A secret that was handed in (``SealedSecret``)."""
    return f"{SECRETS}{secret_id}"


def join_token(token_id: str) -> str:
    """A join token (``JoinToken``)."""
    return f"{TRUST_TOKENS}{token_id}"


def issued(role: str, name: str, serial: str) -> str:
    """A certificate that the CA has signed (``IssuedCertificate``); ``serial`` in hex."""
    return f"{TRUST_ISSUED}{role}/{name}/{serial}"


def renewal_asked(serial: str) -> str:
    """The holder of certificate ``serial`` asks for the next (``RenewalAsk``)."""
    return f"{TRUST_ASKED}{serial}"


def renewed(serial: str) -> str:
    """The answer to it (``Renewed``); the asker takes it away."""
    return f"{TRUST_RENEWED}{serial}"
