"""How the requests about hosts are said. A room of `godwit.model.words`, which knows them all."""

from __future__ import annotations

from godwit.model.flags import Action, Flag, on


def _until(help_: str) -> Flag:
    return Flag("timeout_s", "--timeout", "seconds", help_, "TIME")


_EVEN_WITH_VMS = on("--force", "Even while VMs run there.")


HOST_ACTIONS: tuple[Action, ...] = (
    Action(
        "host.confirm-down",
        "Confirm that {} is down",
        "Say that a host which does not answer is off; only when you know it.",
    ),
    Action(
        "host.power.set",
        "Set the power device of {}",
        "Say how a host's power is switched; the password is kept sealed.",
        (
            Flag(
                "type",
                "--kind",
                "choice",
                "What the device speaks.",
                required=True,
                choices=("redfish", "ipmi", "fence-agent"),
            ),
            Flag(
                "address",
                "--address",
                "text",
                "Where it is: an https URL (redfish), HOST[:PORT] (ipmi, fence-agent).",
                "ADDRESS",
                required=True,
            ),
            Flag("user", "--user", "text", "Who we are to it.", "USER"),
            Flag(
                "password_file",
                "--password-file",
                "path",
                "A file here that holds the password; - is standard input.",
                "FILE",
                required=True,
            ),
            Flag(
                "fingerprint",
                "--fingerprint",
                "text",
                "Of redfish: the SHA-256 of its certificate.",
                "HEX",
            ),
            Flag("ca", "--ca-file", "path", "Of redfish: the CA of its certificate.", "FILE"),
            Flag("system", "--system", "text", "Of redfish: which machine, of several.", "ID"),
            Flag("agent", "--agent", "text", "Of fence-agent: which program.", "fence_..."),
            Flag(
                "options",
                "--option",
                "text",
                "Of ipmi (cipher, privlvl) and fence-agent. May be repeated.",
                "KEY=VALUE",
                many=True,
            ),
        ),
    ),
    Action(
        "host.power.remove",
        "Forget the power device of {}",
        "Forget a host's power device, and its password.",
    ),
    Action(
        "host.power.test",
        "Ask the power device of {}",
        "Ask a host's power device for the host's state; changes nothing.",
    ),
    Action(
        "host.power.on",
        "Switch {} on",
        "Switch a host on; done when its power device says so.",
        (_until("How long it may take (60s)."),),
    ),
    Action(
        "host.power.off",
        "Cut the power of {}",
        "Cut a host's power; done when its power device says that it is off.",
        (_EVEN_WITH_VMS, _until("How long it may take (60s).")),
    ),
    Action(
        "host.power.reset",
        "Reset {}",
        "Cut a host's power, see that it is off, and switch it on again.",
        (_EVEN_WITH_VMS, _until("How long either half may take (60s).")),
    ),
)
