# SPDX-License-Identifier: Apache-2.0
"""Started as Apache CloudStack's agent starts an image server of its own (docs/clients.md).

    python3 -m imageserver --listen IP --port N [--control-socket S]
        [--tls-enabled --tls-cert-file F --tls-key-file F]

The agent gives no environment, has made no directory, and asks at one fixed control socket:

    /var/run/cloudstack/image-server.sock     S, unless it says otherwise
    /var/run/cloudstack/image-server/         0700, beside it: all else that the server needs
        state/  transfers/  admin.sock

``DEFAULTS`` are what it expects. The environment wins over them, and the command line over both.
"""

import argparse
import os
import re
from collections.abc import Mapping

from imageserver.runtime.private import UnusableDirectory, prepare_directory
from imageserver.server.startup import read_settings
from imageserver.settings import Settings, variable_of

#: Where the agent asks; its code has it.
CONTROL_SOCKET = "/var/run/cloudstack/image-server.sock"
_HOST, _PORT = "127.0.0.1", 54322
_MAX_PORT = 65535
#: Of the directory of the control socket, where it is made.
_PUBLIC = 0o755

#: Texts of settings, by name; those of paths are beside the control socket.
DEFAULTS = {
    # Its server bounds nothing. Twelve images at once, each over four connections.
    "max_readers": "48",
    "max_writers": "48",
    "max_readers_per_image": "4",
    "max_writers_per_image": "4",
    # `systemctl stop` leaves the unit's name to a start that may follow at once.
    "drain_timeout": "5",
    # It takes a server that has not answered after 5 s for dead, and stops it.
    "unregister_timeout": "4",
    # It stops the server when no transfer is left: those of an agent that died must not stay.
    "keep_registrations": "no",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that the agent's command line may have."""
    group = parser.add_argument_group(
        "agent's flags",
        "Any of these serves with what the agent of Apache CloudStack expects (docs/clients.md).",
    )
    group.add_argument("--listen", type=_host, metavar="IP", help=f"address (default: {_HOST})")
    group.add_argument("--port", type=_port, metavar="N", help=f"port (default: {_PORT})")
    group.add_argument("--tls-enabled", action="store_true", help="speak TLS")
    group.add_argument("--tls-cert-file", type=os.path.abspath, metavar="FILE", help="PEM chain")
    group.add_argument("--tls-key-file", type=os.path.abspath, metavar="FILE", help="PEM key")
    group.add_argument(
        "--control-socket",
        dest="agent_socket",
        type=os.path.abspath,
        metavar="PATH",
        help=f"where transfers are registered (default: {CONTROL_SOCKET})",
    )


def flags_in(parsed: argparse.Namespace) -> dict[str, str] | None:
    """Return what the flags of ``add_flags`` say, by settings' names; None: there are none.

    Raises:
        ValueError: they do not belong together; ``str()`` says why.
    """
    files = (parsed.tls_cert_file, parsed.tls_key_file)
    given = (parsed.listen, parsed.port, *files, parsed.agent_socket, parsed.tls_enabled or None)
    if all(value is None for value in given):
        return None
    host = parsed.listen or _HOST
    port = _PORT if parsed.port is None else parsed.port
    flags = {"bind": f"{host}:{port}"}
    if parsed.tls_enabled:
        if None in files:
            raise ValueError("--tls-enabled wants --tls-cert-file and --tls-key-file")
        flags |= {"tls_cert": files[0], "tls_key": files[1]}
    if parsed.agent_socket is not None:
        flags["control_socket"] = parsed.agent_socket
    return flags


def _host(text: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F.]*:[0-9a-fA-F:.]+", text):
        return f"[{text}]"
    if re.fullmatch(r"[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no address")
    return text


def _port(text: str) -> int:
    if re.fullmatch(r"[0-9]{1,5}", text) is None or int(text) > _MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to {_MAX_PORT}")
    return int(text)


def settings_of(flags: Mapping[str, str]) -> Settings:
    """Return the settings in force; see ``flags_in``. Ends the process where one is wrong."""
    control = flags.get("control_socket") or os.environ.get(variable_of("control_socket"), "")
    control = control.strip() or CONTROL_SOCKET
    home = _home(control)
    places = {
        "control_socket": control,
        "config_dir": os.path.join(home, "transfers"),
        "runtime_dir": os.path.join(home, "state"),
        "admin_bind": "unix:" + os.path.join(home, "admin.sock"),
    }
    return read_settings(flags, DEFAULTS | places)


def _home(control: str) -> str:
    """Return the directory beside a control socket."""
    stem, extension = os.path.splitext(control)
    return stem if extension == ".sock" else f"{control}.d"


def prepare(settings: Settings) -> None:
    """Make the directories that are missing, and room for the control socket.

    Ends the process with a sentence where that cannot be done.
    """
    control = settings.control_socket
    try:
        # Whatever the umask is: who may write there could take the control socket's place.
        os.makedirs(os.path.dirname(control), mode=_PUBLIC, exist_ok=True)
        for path in (_home(control), os.path.join(_home(control), "transfers")):
            prepare_directory(path)
        # A living server's socket is another check's; what is none of that is in nobody's use.
        if os.path.islink(control) or os.path.isfile(control):
            os.unlink(control)
    except UnusableDirectory as exc:
        raise SystemExit(f"imageserver: {exc}.") from exc
    except OSError as exc:
        raise SystemExit(f"imageserver: {exc.filename} cannot be used: {exc.strerror}.") from exc
