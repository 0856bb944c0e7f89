# SPDX-License-Identifier: Apache-2.0
"""Settings: each is declared once, and read from its ``IMAGESERVER_*`` variable or its flag.

A setting is a field of ``Settings`` with its default, its parser and one line of help. Flags,
the sample environment file and the table in the documentation derive from it. A value that does
not parse stops the server with a sentence that names the variable or the flag.
"""

import difflib
import math
import os
import pwd
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from imageserver.settings.texts import (
    NONE,
    WrongText,
    addresses,
    addresses_or_none,
    choice,
    directory,
    host_names,
    integer,
    integer_or_none,
    origins,
    path,
    paths,
    seconds,
    seconds_or_none,
    size,
    socket_path,
    yes_or_no,
)

PREFIX = "IMAGESERVER_"
#: Variables that share the prefix: of other projects' tests; and what each pod is told of a Service
#: called imageserver (Kubernetes documentation, "Service", "Environment variables").
_FOREIGN = re.compile(
    "IMAGESERVER_((STRESS_)?TEST_.*|SERVICE_HOST=.*|SERVICE_PORT(_[A-Z0-9_]+)?=[0-9]+"
    "|PORT(_[0-9]+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://.*"
    "|PORT_[0-9]+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)=.*)",
    re.DOTALL,
)


class InvalidSetting(Exception):
    """A variable's value is wrong; ``str()`` names it and says what would be right."""


_NO_UID = 2**32 - 1  #: (uid_t)-1, which chown(2) takes for "leave alone"
#: Each has a record in the slot table.
MAX_WORKERS = 128
LEVELS = "debug", "info", "warning", "error"


def _owners(text: str) -> tuple[int, ...]:
    owners = tuple(_uid(part.strip()) for part in text.split(",") if part.strip())
    if not owners:
        raise WrongText("at least one user, such as root")
    return owners


def _uid(name: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", name) and int(name) < _NO_UID:
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError) as exc:
        raise WrongText("user names or numbers that exist, separated by commas") from exc


def _default_workers() -> int:
    return min(max(2, len(os.sched_getaffinity(0))), MAX_WORKERS)


def _default_owners() -> tuple[int, ...]:
    return tuple(sorted({0, os.geteuid()}))


def _default_runtime_dir() -> str:
    for parent in ("/run", os.environ.get("XDG_RUNTIME_DIR", "")):
        path = os.path.join(parent, "imageserver")
        if os.path.isabs(parent) and os.access(
            path if os.path.isdir(path) else parent, os.W_OK | os.X_OK
        ):
            return path
    return os.path.join(tempfile.gettempdir(), f"imageserver-{os.geteuid()}")


def _setting(
    default: Any, parse: Callable[[str], Any], help_text: str, shown: str = "", *, empty: str = ""
) -> Any:
    """Declare a setting; a callable default is computed at start and documented as ``shown``.

    ``empty``: what the variable must say for an empty value, where that is not the default.
    """
    metadata = {"parse": parse, "help": help_text, "shown": shown, "empty": empty}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _switch(help_text: str, *, is_on: bool = False) -> Any:
    return _setting(is_on, yes_or_no, f"{help_text}: yes or no")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, parsed. Seconds and bytes throughout."""

    bind: tuple[str, ...] = _setting(
        ("127.0.0.1:54323",),
        addresses,
        "addresses to serve: HOST:PORT, unix:/PATH or unix:@ABSTRACT, comma-separated",
    )
    workers: int = _setting(
        _default_workers, integer(1, MAX_WORKERS), "worker processes", "CPUs, at least 2"
    )
    threads: int = _setting(
        64,
        integer(1, 1024),
        "requests a worker serves at once; a waiting one costs a thread and no CPU",
    )
    config_dir: str = _setting(
        "/tmp/imagetransfer",  # noqa: S108 - checked at start for who can write it
        path,
        "directory of transfer files",
    )
    config_owners: tuple[int, ...] = _setting(
        _default_owners,
        _owners,
        "users who may own the config directory and its files",
        "root and the server's user",
    )
    runtime_dir: str = _setting(
        _default_runtime_dir,
        directory,
        "private directory for locks, the slot table and registrations",
        "/run/imageserver, else $XDG_RUNTIME_DIR/imageserver, else one per user under /tmp",
    )
    max_readers: int = _setting(8, integer(1, 512), "image reads at once, over all workers")
    max_writers: int = _setting(1, integer(1, 256), "image writes at once, over all workers")
    max_readers_per_image: int | None = _setting(
        None,
        integer_or_none(1, 512),
        "reads of one image at once, of those that MAX_READERS allows, or none",
        "none",
        empty=NONE,
    )
    max_writers_per_image: int | None = _setting(
        None,
        integer_or_none(1, 256),
        "writes of one image at once, of those that MAX_WRITERS allows, or none",
        "none",
        empty=NONE,
    )
    client_timeout: float = _setting(
        60.0, seconds(0.1, 86400), "seconds a client may be silent, or take to send a head"
    )
    backend_timeout: float = _setting(
        60.0, seconds(0.1, 86400), "seconds in which a back end must complete some request"
    )
    nbd_idle_seconds: float = _setting(
        1.0,
        seconds(0, 60),
        "seconds an unused NBD connection is kept for the next request; 0: none",
    )
    drain_timeout: float = _setting(
        600.0, seconds(0, 604800), "seconds running transfers get to finish on stop or reload"
    )
    keepalive: float = _setting(75.0, seconds(1, 86400), "seconds an idle connection stays open")
    chunk_size: int = _setting(
        1 << 20, size(4096, 32 << 20), "bytes of one back-end request and one piece of a body"
    )
    queue_depth: int = _setting(3, integer(1, 64), "back-end requests in flight per transfer")
    file_roots: tuple[str, ...] = _setting(
        (), paths, "directories the file backend may touch, comma-separated", "any"
    )
    keep_page_cache: bool = _switch(
        "whether what long streams of files bring into the host's page cache stays"
    )
    put_flush: bool = _switch("whether a PUT without flush in its URL is flushed")
    cors_origins: tuple[str, ...] = _setting(
        (),
        origins,
        "web sites whose scripts may ask: https://HOST[:PORT], comma-separated, or * for any",
        "none",
    )
    tls_cert: str = _setting(
        "", path, "PEM certificate chain; TCP addresses speak TLS 1.2 or newer with it", "none"
    )
    tls_key: str = _setting(
        "", path, "PEM private key of the certificate, unencrypted", "in the certificate's file"
    )
    tls_client_ca: str = _setting(
        "", path, "PEM certificates of which one must have signed a client's", "any client"
    )
    ktls: bool = _switch("whether the kernel encrypts where it can (kTLS)")
    control_socket: str = _setting(
        "",
        socket_path,
        "Unix socket where root and the server's user and group register transfers",
        "none",
    )
    idle_timeout: int = _setting(
        600, integer(1, 31_536_000), "seconds after which an unused registered transfer expires"
    )
    unregister_timeout: float = _setting(
        math.inf,
        seconds_or_none(0, 31_536_000),
        "seconds an unregister without a timeout of its own waits for requests in flight, or none",
        "none",
        empty=NONE,
    )
    keep_registrations: bool = _switch(
        "whether registered transfers outlive a stop of the server (its death they do)", is_on=True
    )
    admin_bind: tuple[str, ...] = _setting(
        ("127.0.0.1:54324",),
        addresses_or_none,
        "addresses for metrics, health and status, as BIND; none: there are no such",
        empty=NONE,
    )
    admin_hosts: tuple[str, ...] = _setting(
        (),
        host_names,
        "names under which browsers and programs may ask at ADMIN_BIND, comma-separated",
        "the machine's own name, localhost; IP addresses always may",
    )
    log_format: str = _setting(
        "text", choice("text", "json"), "how log lines are written: text or json"
    )
    log_level: str = _setting(
        "info", choice(*LEVELS), f"least severe messages to log: {', '.join(LEVELS)}"
    )

    @property
    def readers_of_image(self) -> int:
        """How many may read one image at once."""
        return min(self.max_readers, self.max_readers_per_image or self.max_readers)

    @property
    def writers_of_image(self) -> int:
        """How many may write to one image at once, if it takes more than one."""
        return min(self.max_writers, self.max_writers_per_image or self.max_writers)

    @property
    def registered_dir(self) -> str:
        """Where registered transfers live."""
        return os.path.join(self.runtime_dir, "registered")

    @property
    def activity_dir(self) -> str:
        """Where the use of transfers that can expire is noted."""
        return os.path.join(self.runtime_dir, "activity")

    @property
    def metrics_dir(self) -> str:
        """Where processes count."""
        return os.path.join(self.runtime_dir, "metrics")

    @property
    def control_address(self) -> tuple[str, ...]:
        """The control socket as one more address to listen on, if there is one."""
        return (f"unix:{self.control_socket}",) if self.control_socket else ()

    def text(self, name: str) -> str:
        """Return a setting's value as its variable takes it."""
        (declared,) = (f for f in fields(self) if f.name == name)
        return as_text(getattr(self, name)) or str(declared.metadata["empty"])

    @property
    def unix_socket(self) -> str | None:
        """The Unix socket that OPTIONS advertises; a leading NUL says it is abstract (unix(7))."""
        for address in self.bind:
            if address.startswith("unix:"):
                path = address.removeprefix("unix:")
                path = "\0" + path[1:] if path.startswith("@") else path
                return os.fsencode(path).decode(errors="surrogateescape")
        return None

    @classmethod
    def from_environ(
        cls, environ: Mapping[str, str], flags: Mapping[str, str] | None = None
    ) -> "Settings":
        """Read the settings from variables, where an empty value counts as absent.

        ``flags``: texts by a setting's name; they win, whatever the variable says.

        Raises:
            InvalidSetting: a value is wrong, or a variable with the prefix names no setting.
        """
        known = {variable_of(f.name): f for f in fields(cls)}
        given = {name: text for name, text in environ.items() if text.strip()}
        for variable, text in given.items():
            is_ours = variable.startswith(PREFIX) and not _FOREIGN.fullmatch(f"{variable}={text}")
            if is_ours and variable not in known:
                raise InvalidSetting(f"{variable} is not a setting; {_hint(variable, known)}")
        values = {}
        for variable, declared in known.items():
            if flags and declared.name in flags:
                flag = flag_of(declared.name)
                values[declared.name] = _parsed(declared, flag, flags[declared.name])
            elif variable in given:
                values[declared.name] = _parsed(declared, variable, given[variable])
        return cls(**values)


def _parsed(declared: Field[Any], source: str, text: str) -> Any:
    try:
        return declared.metadata["parse"](text.strip())
    except WrongText as exc:
        raise InvalidSetting(f"{source}={text!r} is wrong: it must be {exc}.") from exc


def _hint(variable: str, known: Iterable[str]) -> str:
    names = {name.removeprefix(PREFIX): name for name in known}
    near = difflib.get_close_matches(variable.removeprefix(PREFIX).upper(), names, 1)
    return f"did you mean {names[near[0]]}?" if near else f"known are {', '.join(known)}."


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return PREFIX + name.upper()


def flag_of(name: str) -> str:
    """Return the command line's flag of a setting."""
    return "--" + name.replace("_", "-")


def as_text(value: object) -> str:
    """Write a value as a variable takes it; an empty one: see ``Settings.text``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is None or value == math.inf:
        return ""
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return str(value)
