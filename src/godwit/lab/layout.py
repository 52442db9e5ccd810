"""Where everything of a lab lies and what it is called; pure.

    real machine                                    the lab's own
    /run/gw/<lab>/<node>.sock   control sockets     namespaces gw-<lab>-switch, -client, -control,
    <state>/<lab>/              everything else       -host1 .. -hostN, -bmc1 .. -bmcN
      lab.json  token  pki/  volumes/  images/      control groups godwit-lab/<lab>/<node>
      logs/<node>/  nodes/<node>/{root,etc,state}  bmcs/<host>/

Each network is a bridge in the switch namespace; a node or a BMC has one cable (a veth pair) to
each network it is on, called like the network with a 0 behind it on the node's side (``mig0``) and
``<node>-<network>`` on the switch's side. Because all of it is inside namespaces, labs of
different names use the same addresses side by side.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from godwit.model.errors import InvalidRequest
from godwit.store.etcd import EtcdMember

DEFAULT_NAME: Final = "lab"
MAX_HOSTS: Final = 32
MAX_NAME: Final = 20
RUN_ROOT: Final = Path("/run/gw")
GROUPS: Final = "godwit-lab"  # not `godwit`: there lie the VMs of a real host
CONTROL: Final = "control"
CLIENT: Final = "client"
SWITCH: Final = "switch"
STORAGE: Final = "storage"
WATCHDOG: Final = "watchdog"
VM_NETWORK: Final = "lan"
STORE_PORT: Final = 7379
STORE_PEER_PORT: Final = 7380
STORE_HOSTS: Final = 3  # so many hosts have a member of etcd; more would only write more
AGENT_PORT: Final = 7101
FENCE_PORT: Final = 7102
API_PORT: Final = 7100  # of the manager on the management network
OPERATOR: Final = "operator"  # the identity below pki/ that the lab itself uses
QEMU_USER: Final = "godwit-qemu"

StorageKind = Literal["dir", "nfs", "iscsi"]
StoreKind = Literal["sqlite", "etcd"]

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Net:
    """One network of a lab."""

    name: str
    subnet: str

    @property
    def bridge(self) -> str:
        """Its bridge in the switch namespace."""
        return f"br-{self.name}"

    @property
    def port(self) -> str:
        """The name of a node's own end of its cable."""
        return f"{self.name}0"

    def address(self, number: int) -> str:
        """The address with this number in the subnet."""
        return str(ipaddress.ip_network(self.subnet)[number])

    def cidr(self, number: int) -> str:
        """The address with this number, with the length of the subnet's prefix."""
        return f"{self.address(number)}/{ipaddress.ip_network(self.subnet).prefixlen}"


LAN: Final = Net(VM_NETWORK, "10.91.0.0/22")
MGMT: Final = Net("mgmt", "10.92.0.0/24")
MIG: Final = Net("mig", "10.93.0.0/24")
STOR: Final = Net("stor", "10.94.0.0/24")
NETS: Final = (LAN, MGMT, MIG, STOR)
CLIENT_NUMBER: Final = 1
CONTROL_NUMBER: Final = 1
STORAGE_NUMBER: Final = 1
STORAGE_MGMT_NUMBER: Final = 2
FIRST_HOST_NUMBER: Final = 11
FIRST_BMC_NUMBER: Final = 111


@dataclass(frozen=True, slots=True)
class Cable:
    """A veth pair between a node and a network's bridge; ``cidr`` is empty on a bridge's port."""

    node: str
    net: Net
    cidr: str = ""

    @property
    def switch_port(self) -> str:
        """The end in the switch namespace."""
        return f"{self.node}-{self.net.name}"


@dataclass(frozen=True, slots=True)
class Layout:
    """A lab of ``hosts`` hosts called ``name``. ``rate`` is like ``1gbit``, empty for no limit.

    ``storage``: the volume ``shared`` is a directory of this machine (``dir``) or is served over
    the storage network (``nfs``) by a node of its own; ``iscsi`` serves a volume ``luns`` beside
    the directory.

    ``store``: the embedded one on the control node, or etcd on hosts. ``managers``: on so many
    hosts, 0 for one on the control node.
    """

    name: str
    hosts: int
    rate: str = "1gbit"
    state_root: Path = Path("/var/lib/godwit-lab")
    run_root: Path = RUN_ROOT
    storage: StorageKind = "dir"
    store: StoreKind = "sqlite"
    managers: int = 0

    # Names

    @property
    def host_names(self) -> tuple[str, ...]:
        """host1 .. hostN."""
        return tuple(f"host{number}" for number in range(1, self.hosts + 1))

    @property
    def nodes(self) -> tuple[str, ...]:
        """What has a supervisor: the control node, what serves storage, and the hosts."""
        served = () if self.storage == "dir" else (STORAGE,)
        return (CONTROL, *served, *self.host_names)

    @property
    def manager_nodes(self) -> tuple[str, ...]:
        """Where a manager runs."""
        return self.host_names[: self.managers] if self.managers else (CONTROL,)

    @property
    def store_members(self) -> tuple[EtcdMember, ...]:
        """The members of etcd; none with the embedded store. Two hosts get a witness beside."""
        if self.store != "etcd":
            return ()
        nodes = [*self.host_names[:STORE_HOSTS], *((CONTROL,) if self.hosts == 2 else ())]
        ports = (STORE_PORT, STORE_PEER_PORT)
        return tuple(EtcdMember(node, self.mgmt_address(node), *ports) for node in nodes)

    @property
    def places(self) -> tuple[str, ...]:
        """Every WHERE of ``lab exec``."""
        return (*self.nodes, CLIENT, SWITCH, *self.bmcs)

    @property
    def bmcs(self) -> tuple[str, ...]:
        """bmc1 .. bmcN: what switches the power of the host of that number."""
        return tuple(self.bmc(host) for host in self.host_names)

    def bmc(self, host: str) -> str:
        """``bmc1`` of ``host1``."""
        return f"bmc{host_number(host)}"

    @property
    def prefix(self) -> str:
        """The start of the names of this lab's namespaces."""
        return f"gw-{self.name}-"

    def netns(self, place: str) -> str:
        """The network namespace of a place."""
        return self.prefix + place

    def cgroup(self, node: str) -> str:
        """The control group that holds all of a node."""
        return f"{GROUPS}/{self.name}/{node}"

    # Files

    @property
    def state(self) -> Path:
        """Everything this lab keeps on the disk."""
        return self.state_root / self.name

    @property
    def run(self) -> Path:
        """Its sockets; a short path."""
        return self.run_root / self.name

    @property
    def record(self) -> Path:
        """What was made so far, for ``lab down``."""
        return self.state / "lab.json"

    @property
    def token(self) -> Path:
        """The bearer token of the API."""
        return self.state / "token"

    @property
    def pki(self) -> Path:
        """The cluster's CA, and the identity the lab itself uses towards agents."""
        return self.state / "pki"

    @property
    def volume(self) -> Path:
        """The directory that every host sees as the volume ``shared``."""
        return self.state / "volumes" / "shared"

    def more_volumes(self) -> tuple[Path, ...]:
        """Further directories that every host sees, as they were made when the lab was."""
        folder = self.volume.parent
        if not folder.is_dir():
            return ()
        return tuple(sorted(path for path in folder.iterdir() if path != self.volume))

    def own_volumes(self, node: str) -> tuple[Path, ...]:
        """A host's own volumes, as they were made when the lab was."""
        folder = self.node_dir(node) / "volumes"
        return tuple(sorted(folder.iterdir())) if folder.is_dir() else ()

    @property
    def images(self) -> Path:
        """Guest images, as hosts see them."""
        return self.state / "images"

    def node_dir(self, node: str) -> Path:
        """A node's own directories: ``root`` (empty, built on), ``etc`` and ``state``."""
        return self.state / "nodes" / node

    def bmc_dir(self, host: str) -> Path:
        """The files of a host's BMC."""
        return self.state / "bmcs" / host

    def boot_id(self, node: str) -> Path:
        """What a node reads as its kernel's boot id; another one after each power-on."""
        return self.node_dir(node) / "boot-id"

    def logs(self, node: str) -> Path:
        """A node's logs, one file per unit."""
        return self.state / "logs" / node

    @property
    def watchdog_group(self) -> str:
        """The control group of what is every host's watchdog."""
        return f"{GROUPS}/{self.name}/{WATCHDOG}"

    @property
    def watchdog_log(self) -> Path:
        """What it has to say."""
        return self.state / "logs" / f"{WATCHDOG}.log"

    def watchdog(self, node: str) -> Path:
        """The socket that a host sees as /dev/watchdog."""
        return self.run / f"{node}.watchdog"

    def control_socket(self, node: str) -> Path:
        """Where a node's supervisor is talked to from the real machine."""
        return self.run / f"{node}.sock"

    # Network

    def cables(self, node: str) -> tuple[Cable, ...]:
        """The cables of a node or of the client."""
        if node == CLIENT:
            return (Cable(node, LAN, LAN.cidr(CLIENT_NUMBER)),)
        if node == CONTROL:
            return (Cable(node, MGMT, MGMT.cidr(CONTROL_NUMBER)),)
        if node == STORAGE:  # managers reach its fencing daemon, and hosts its servers
            mgmt = Cable(node, MGMT, MGMT.cidr(STORAGE_MGMT_NUMBER))
            return (mgmt, Cable(node, STOR, STOR.cidr(STORAGE_NUMBER)))
        if node in self.bmcs:
            number = FIRST_BMC_NUMBER - 1 + int(node.removeprefix("bmc"))
            return (Cable(node, MGMT, MGMT.cidr(number)),)
        number = FIRST_HOST_NUMBER - 1 + host_number(node)
        # On the VM network the host is a switch, not a station.
        return (Cable(node, LAN), *(Cable(node, net, net.cidr(number)) for net in NETS[1:]))

    def all_cables(self) -> tuple[Cable, ...]:
        """Every cable of the lab."""
        return tuple(c for node in (CLIENT, *self.nodes, *self.bmcs) for c in self.cables(node))

    def address(self, host: str, net: Net) -> str:
        """A host's address on one of the networks."""
        return net.address(FIRST_HOST_NUMBER - 1 + host_number(host))

    def bmc_address(self, host: str) -> str:
        """Where a host's BMC is, on the management network."""
        return MGMT.address(FIRST_BMC_NUMBER - 1 + host_number(host))

    @property
    def storage_address(self) -> str:
        """What serves the storage, as hosts reach it."""
        return STOR.address(STORAGE_NUMBER)

    @property
    def fence_url(self) -> str:
        """The fencing daemon of what serves the storage, as managers reach it."""
        return f"https://{self.mgmt_address(STORAGE)}:{FENCE_PORT}"

    def mgmt_address(self, node: str) -> str:
        """The address of a node on the management network."""
        if node == STORAGE:
            return MGMT.address(STORAGE_MGMT_NUMBER)
        return MGMT.address(CONTROL_NUMBER) if node == CONTROL else self.address(node, MGMT)

    def store_urls(self, node: str) -> tuple[str, ...]:
        """The store as a node reaches it: its own member first, else each node another one."""
        members = self.store_members
        if not members:
            return (f"https://{self.mgmt_address(CONTROL)}:{STORE_PORT}",)
        names = [member.name for member in members]
        number = 0 if node == CONTROL else host_number(node)
        first = names.index(node) if node in names else number % len(members)
        return tuple(member.client_url for member in (*members[first:], *members[:first]))

    def agent_url(self, host: str) -> str:
        """A host's agent, as others reach it."""
        return f"https://{self.address(host, MGMT)}:{AGENT_PORT}"


def host_number(host: str) -> int:
    """2 for host2; InvalidRequest when it is no host's name."""
    digits = host.removeprefix("host")
    if not host.startswith("host") or not digits.isdigit() or digits.startswith("0"):
        raise InvalidRequest(f"{host!r} is not a host", hint="write host1, host2, ...")
    return int(digits)


def net_named(name: str) -> Net:
    """A network by its name; InvalidRequest names those there are."""
    found = next((net for net in NETS if net.name == name), None)
    if found is None:
        known = ", ".join(net.name for net in NETS)
        raise InvalidRequest(f"there is no network {name!r}", hint=f"networks: {known}")
    return found


def checked_name(name: str) -> str:
    """The name of a lab itself; InvalidRequest when namespaces or sockets could not bear it."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r} cannot name a lab",
            hint=f"lower-case letters, digits and -, at most {MAX_NAME}",
        )
    return name


def checked_managers(count: int, hosts: int) -> int:
    """The number of managers itself; InvalidRequest when there are not as many hosts."""
    if not 0 <= count <= hosts:
        raise InvalidRequest(
            f"{count} managers on {hosts} hosts", hint="at most one on each host; 0: on control"
        )
    return count


def checked_hosts(count: int) -> int:
    """The number of hosts itself; InvalidRequest when a lab cannot have as many."""
    if not 1 <= count <= MAX_HOSTS:
        raise InvalidRequest(f"a lab of {count} hosts", hint=f"1 to {MAX_HOSTS} are possible")
    return count


def state_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Where labs keep their state: ``${GODWIT_LAB_DIR:-/var/lib/godwit-lab}``."""
    return Path(environ.get("GODWIT_LAB_DIR") or "/var/lib/godwit-lab")
