"""How each request is said: one table that the command line and the renderers share.

``ACTIONS`` maps a request's kind to its words, its positional field and its flags. A flag has a
``sort`` of value, which `godwit.model.spelling` turns into text and back.
Nothing here imports pydantic, so that ``godwit --help`` stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from godwit.model.cluster_words import CLUSTER_ACTIONS
from godwit.model.disks import FORMATS
from godwit.model.errors import InvalidRequest
from godwit.model.flags import Action as Action
from godwit.model.flags import Flag as Flag
from godwit.model.flags import host_option, on
from godwit.model.host_words import HOST_ACTIONS
from godwit.model.maintenance_words import MAINTENANCE_ACTIONS
from godwit.model.rule_words import RULES, SET_VM
from godwit.model.spelling import read
from godwit.model.validation_words import VALIDATE


def _format(field: str, option: str, help_: str, *, more: tuple[str, ...] = ()) -> Flag:
    return Flag(field, option, "choice", help_, choices=(*FORMATS, *more))


FENCE_URL = Flag(
    "fence_url", "--fence-url", "text", "Of nfs, iscsi: its server's fencing daemon.", "URL"
)
_AT = (Flag("host", "--host", "name", "Which host.", "HOST", required=True, completes="host"),)


def _disk_name() -> Flag:
    return Flag("disk", "", "name", "", "DISK", required=True)


def _checkpoint_name() -> Flag:
    return Flag("checkpoint", "", "name", "", "CHECKPOINT", required=True)


_LIST: tuple[Action, ...] = (
    Action(
        "vm.create",
        "Create VM {}",
        "Define a VM; start it with 'godwit vm start'.",
        (
            Flag("memory_bytes", "--memory", "size", "Its memory.", "SIZE", required=True),
            Flag("cpus", "--cpus", "count", "Its virtual CPUs (default 1).", "N"),
            Flag(
                "cpu",
                "--cpu",
                "text",
                "baseline: the cluster's (default); host: its host's own, with which it cannot "
                "move; or a model, like Nehalem-v1.",
                "CPU",
            ),
            Flag("image", "--image", "name", "Start from this image, such as demo.", "IMAGE"),
            Flag("kernel", "--kernel", "path", "Start this kernel (a file here).", "FILE"),
            Flag("initrd", "--initrd", "path", "With this initial RAM disk.", "FILE"),
            Flag("append", "--append", "text", "With this kernel command line.", "TEXT"),
            Flag(
                "firmware",
                "--firmware",
                "choice",
                "bios (default), or uefi: with variables in an image of its own.",
                choices=("bios", "uefi"),
            ),
            Flag(
                "disks",
                "--disk",
                "disk",
                "A new disk; FORMAT: qcow2 (default), raw, vhd-fixed, vhd, vhdx. May be repeated.",
                "VOLUME:SIZE[:FORMAT]",
                many=True,
            ),
            Flag(
                "cloud_init",
                "--cloud-init",
                "path",
                "Give its cloud-init this user data (a file here).",
                "FILE",
            ),
            Flag("iso", "--iso", "text", "An ISO image in its CD drive.", "VOLUME:PATH"),
            Flag(
                "networks",
                "--network",
                "name",
                "A network card on this network. May be repeated.",
                "NETWORK",
                many=True,
                completes="network",
            ),
            host_option("--host", "Where its first start should go (default: placed)."),
            on("--ha", "Start it elsewhere when its host dies."),
            *RULES,
            on("--guest-agent", "Give it a port for qemu-guest-agent."),
        ),
    ),
    SET_VM,
    Action("vm.delete", "Delete VM {}", "Forget a stopped VM and delete its disks."),
    Action(
        "vm.start",
        "Start VM {}",
        "Power a VM on (or go on from its saved memory).",
        (host_option("--host", "Start it there (default: placed by free memory and CPU)."),),
    ),
    Action(
        "vm.stop",
        "Stop VM {}",
        "Ask the guest to shut down.",
        (
            on("--force", "Cut the power at once."),
            Flag("timeout_s", "--timeout", "seconds", "How long it may take (60s).", "TIME"),
        ),
    ),
    Action("vm.pause", "Pause VM {}", "Hold a VM's CPUs; its memory stays."),
    Action("vm.resume", "Resume VM {}", "Let a paused VM run."),
    Action("vm.save", "Save VM {}", "Write a VM's memory to its volume and power it off."),
    Action(
        "vm.restore",
        "Restore VM {}",
        "Go on from the saved memory.",
        (host_option("--host", "Restore it there (default: placed)."),),
    ),
    Action(
        "vm.migrate",
        "Move VM {}",
        "Move a running VM to another host.",
        (
            host_option("--to", "Where to (default: placed by free memory and CPU)."),
            Flag(
                "method",
                "--method",
                "choice",
                "live: it runs on (default); quick: saved, handed over, restored.",
                choices=("live", "quick"),
            ),
            Flag("max_blackout_ms", "--max-blackout", "ms", "Longest pause (300ms).", "TIME"),
            Flag("deadline_s", "--deadline", "seconds", "Give up after this (10m).", "TIME"),
            on("--allow-postcopy", "Let it finish by post-copy when it would not converge."),
            on("--allow-throttle", "Let it slow the guest down when it would not converge."),
            on("--allow-unvalidated", "Move although the hosts' validation failed."),
        ),
    ),
    Action(
        "vm.clone",
        "Clone VM {}",
        "Make a second VM out of a stopped one.",
        (
            on("--linked", "Its images hold only what changes; the first VM stays stopped then."),
            Flag("append", "--append", "text", "With this kernel command line instead.", "TEXT"),
        ),
        arguments=(Flag("target", "", "name", "", "NEW", required=True),),
    ),
    Action(
        "vm.disk.add",
        "Add a disk to VM {}",
        "Give a VM one more disk, also while it runs.",
        (
            Flag("path", "--existing", "text", "Take this image of the volume.", "PATH"),
            Flag("lun", "--lun", "count", "Take this LUN of an iscsi volume.", "N"),
            Flag("device", "--device", "text", "Take this block device of the host.", "/dev/..."),
            _format("format", "--format", "What the image is: needed with --existing."),
            Flag(
                "tier",
                "--tier",
                "choice",
                "Who opens the image: QEMU (direct) or a storage broker (default: by format).",
                choices=("auto", "direct", "brokered"),
            ),
            on("--passthrough", "The device is a SCSI LUN and gets the guest's commands."),
        ),
        arguments=(
            Flag(
                "volume",
                "",
                "place",
                "",
                "[VOLUME[:SIZE[:FORMAT]]]",
                covers=("volume", "size_bytes", "format"),
            ),
        ),
    ),
    Action(
        "vm.disk.remove",
        "Remove a disk from VM {}",
        "Take a disk from a VM and delete its image.",
        (
            on("--force", "Even while the guest writes to it."),
            on("--keep", "Keep the image."),
        ),
        arguments=(_disk_name(),),
    ),
    Action(
        "vm.disk.resize",
        "Resize a disk of VM {}",
        "Let a disk grow to SIZE, also while its VM runs.",
        arguments=(_disk_name(), Flag("size_bytes", "", "size", "", "SIZE", required=True)),
    ),
    Action(
        "vm.disk.move",
        "Move a disk of VM {}",
        "Move a disk to another volume or format, also while its VM runs.",
        (
            Flag("to", "--to", "name", "The volume it moves to (default: where it is).", "VOLUME"),
            _format("format", "--format", "What it becomes (default: what it is)."),
            on("--keep", "Keep the old image."),
            Flag(
                "max_bytes_per_s",
                "--max-rate",
                "size",
                "While the VM runs, copy at most so many bytes a second (default: no limit).",
                "SIZE",
            ),
        ),
        arguments=(_disk_name(),),
    ),
    Action(
        "vm.disk.export",
        "Export a disk of VM {}",
        "Write a copy of a stopped VM's disk to a new file below /clusterstorage.",
        (_format("format", "--format", "What the copy is (default qcow2)."),),
        arguments=(_disk_name(), Flag("target", "", "text", "", "TARGET", required=True)),
    ),
    Action(
        "vm.checkpoint.create",
        "Make a checkpoint of VM {}",
        "Keep what a VM's disks hold at this instant, also while it runs.",
        arguments=(_checkpoint_name(),),
    ),
    Action(
        "vm.checkpoint.revert",
        "Revert VM {} to a checkpoint",
        "Let a stopped VM's disks hold again what they held then.",
        arguments=(_checkpoint_name(),),
    ),
    Action(
        "vm.checkpoint.delete",
        "Delete a checkpoint of VM {}",
        "Forget a checkpoint; what the disks hold now stays.",
        arguments=(_checkpoint_name(),),
    ),
    Action(
        "migration.cancel",
        "Cancel move {}",
        "Call a move off; possible until the owner changes.",
        subject="id",
    ),
    Action(
        "network.create",
        "Create network {}",
        "Define a VM network; each host makes its bridge.",
        (
            Flag("mtu", "--mtu", "count", "Its MTU (default 1500).", "N"),
            Flag("subnet", "--subnet", "text", "Its subnet, for people to see.", "CIDR"),
            Flag("uplink", "--uplink", "text", "The interface that leads out.", "INTERFACE"),
        ),
    ),
    Action("network.delete", "Delete network {}", "Remove a network that no VM uses."),
    Action(
        "volume.create",
        "Create volume {}",
        "Define a volume, called /clusterstorage/NAME on every host.",
        (
            Flag(
                "type",
                "--kind",
                "choice",
                "dir: a directory that hosts share (default); local: each host has its own;"
                " nfs, iscsi, rbd: served over the network to QEMU itself.",
                choices=("dir", "local", "nfs", "iscsi", "rbd"),
            ),
            Flag("path", "--path", "text", "What lies beneath, for people to see.", "PATH"),
            Flag("server", "--server", "text", "Of nfs: the server.", "HOST"),
            Flag("export", "--export", "text", "Of nfs: the directory it exports.", "PATH"),
            Flag("portal", "--portal", "text", "Of iscsi: where the target is.", "HOST[:PORT]"),
            Flag("target", "--target", "text", "Of iscsi: the target's name.", "IQN"),
            Flag("pool", "--pool", "text", "Of rbd: the Ceph pool.", "POOL[/NAMESPACE]"),
            Flag("client", "--client", "text", "Of rbd: who hosts are to Ceph.", "NAME"),
            FENCE_URL,
        ),
    ),
    Action("volume.set", "Change volume {}", "Change what is known of a volume.", (FENCE_URL,)),
    Action("volume.delete", "Delete volume {}", "Forget a volume that no VM uses; its files stay."),
    Action("volume.redirect", "Redirect volume {}", "Let a host's I/O go through another.", _AT),
    Action("volume.restore", "Restore volume {}", "Let a host use its own path again.", _AT),
    Action(
        "volume.disk.import",
        "Import a disk into volume {}",
        "Bring an image into a volume, from a file below /clusterstorage or a URL.",
        (
            _format("format", "--format", "What it is (default qcow2).", more=("vmdk",)),
            _format("target_format", "--target-format", "What it becomes (default qcow2)."),
        ),
        subject="volume",
        arguments=(
            Flag("name", "", "name", "", "NAME", required=True),
            Flag("source", "", "text", "", "SOURCE", required=True),
        ),
    ),
    *HOST_ACTIONS,
    *MAINTENANCE_ACTIONS,
    *CLUSTER_ACTIONS,
    VALIDATE,
    Action("task.cancel", "Cancel task {}", "Ask a task to stop.", subject="id"),
)
ACTIONS: dict[str, Action] = {action.kind: action for action in _LIST}
METHODS: dict[tuple[str, str], Action] = {(one.nouns, one.method): one for one in _LIST}
# What has a plan to show, with --dry-run.
PLANNED = frozenset({"vm.create", "vm.migrate", "host.drain", "host.maintenance.enter"})


def place_arguments(action: Action, texts: Sequence[str | None]) -> dict[str, Any]:
    """The fields of a command's arguments after its subject, in their order; None is not said."""
    fields: dict[str, Any] = {}
    for flag, text in zip(action.arguments, texts, strict=False):
        if text is not None:
            value = read(flag.sort, text)
            fields |= value if flag.covers else {flag.field: value}
    return fields


def merge(arguments: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Both together; InvalidRequest where they say different things."""
    for field in arguments.keys() & options.keys():
        if arguments[field] != options[field]:
            raise InvalidRequest(
                f"{field}: said twice, {arguments[field]} and {options[field]}",
                hint="say it once",
            )
    return arguments | options
