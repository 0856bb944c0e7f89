# SPDX-License-Identifier: Apache-2.0
"""``imageserver share``: its command line, and everything that it does, in order.

    reserve the port     refuse what cannot be shared     start qemu-nbds     start the server
    print the URLs       watch, until a signal            end all, in reverse

What is refused is refused before anything is started.
"""

import argparse
import contextlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from imageserver.backends.table import KINDS
from imageserver.client.failures import ClientError, LocalFailure
from imageserver.client.local.transfer_files import ConfigDirectory
from imageserver.client.showing.units import plain_text
from imageserver.core.transfer import transfer_from_fields
from imageserver.settings import Settings
from imageserver.sharing.nbd import NbdServer
from imageserver.sharing.place import LOOPBACK, Address, private_directory
from imageserver.sharing.progress import Progress, is_shown
from imageserver.sharing.serving import ImageServer
from imageserver.sharing.session import Session, Signals, end_output, write
from imageserver.sharing.shown import Shared, copy_names
from imageserver.sharing.sources import FORMATS, Source, Wanted, open_sources

#: As ``serve`` does not, for clients of several connections (conf/limits.env); and no line for each
#: request.
_DEFAULTS = {
    "max_readers": "48",
    "max_writers": "48",
    "max_readers_per_image": "4",
    "max_writers_per_image": "4",
    "log_level": "warning",
}
#: What a server would take over from the one, or from systemd, that has started it; and settings
#: that are for others who name files, and of no use here.
_FOREIGN = (
    "GUNICORN_FD",
    "GUNICORN_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "IMAGESERVER_CONTROL_SOCKET",
    "IMAGESERVER_FILE_ROOTS",
)
_ID_BYTES = 16
_DESCRIPTION = """\
Share disk images over HTTP until Ctrl-C: prints a URL for each FILE.

Whoever knows a URL may read the image, and write it unless --read-only. Everything that this
command starts and makes ends with it."""
_EPILOG = """\
examples:
  imageserver share disk.qcow2                           read and write, from this host only
  imageserver share --read-only --bind 0.0.0.0 *.qcow2   read, from anywhere
  imageserver share --read-only --bitmap b0 a.qcow2       with what has changed since

A FILE is raw, qcow2 (with all that it is based on), luks, vdi, vhdx or vpc, or a block device.
The settings of `imageserver serve` count, by their variables (IMAGESERVER_TLS_CERT, ...).
"""


@dataclass(frozen=True, slots=True)
class Server:
    """What this command needs of the server."""

    read_settings: Callable[[Mapping[str, str], Mapping[str, str]], Settings]
    """From flags, and defaults for what neither they nor the environment have."""
    serve: Callable[[Settings], object]
    """Serve; never returns."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command line of ``share`` may have."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("files", nargs="+", metavar="FILE", help="an image to share")
    flags: dict[str, dict[str, Any]] = {
        "--read-only": {"action": "store_true", "help": "forbid every change"},
        "--bitmap": {"metavar": "NAME", "help": "the dirty bitmap that tells what has changed"},
        "--format": {
            "choices": FORMATS,
            "metavar": "F",
            "help": f"format of FILE: {', '.join(FORMATS)} (default: what its header says)",
        },
        "--bind": {
            "metavar": "ADDR",
            "default": LOOPBACK,
            "help": "HOST or HOST:PORT to serve at (default: 127.0.0.1, a free port)",
        },
        "--secret-file": {"metavar": "PATH", "help": "the passphrase of encrypted (LUKS) images"},
        "--allow-remote": {
            "action": "store_true",
            "help": "let QEMU open what is no file here, as FILE or below one: rbd:, nfs:, iscsi:, "
            "https:, json:",
        },
        "--json": {"action": "store_true", "help": "print one JSON object a line for programs"},
    }
    for flag, told in flags.items():
        parser.add_argument(flag, **told)


def share(parsed: argparse.Namespace, server: Server) -> int:
    """Share the files of a command line until a signal; return the exit status."""
    for name in _FOREIGN:
        os.environ.pop(name, None)
    wanted = Wanted(
        read_only=parsed.read_only,
        bitmap=parsed.bitmap,
        format=parsed.format,
        secret_file=parsed.secret_file,
        allow_remote=parsed.allow_remote,
    )
    try:
        with contextlib.ExitStack() as stack:
            return _share(parsed, wanted, server, stack)
    except ClientError as exc:
        write(f"imageserver: {plain_text(str(exc))}.\n", errors=True)
        return exc.status
    finally:
        end_output()


def _share(
    parsed: argparse.Namespace, wanted: Wanted, server: Server, stack: contextlib.ExitStack
) -> int:
    run = _Run(parsed, wanted, stack)
    settings = server.read_settings(run.places, _DEFAULTS)
    run.start_nbds()
    run.start_server(lambda: server.serve(settings))
    run.announce(settings)
    return run.watch()


class _Run:
    """One run; ``stack`` ends everything in reverse."""

    def __init__(
        self, parsed: argparse.Namespace, wanted: Wanted, stack: contextlib.ExitStack
    ) -> None:
        self._parsed, self._wanted, self._stack = parsed, wanted, stack
        self._signals = stack.enter_context(contextlib.closing(Signals()))
        self._address = Address.reserve(parsed.bind)
        stack.callback(self._address.holder.close)
        self._directory = stack.enter_context(private_directory())
        self._transfers = ConfigDirectory(os.path.join(self._directory, "transfers"))
        self._nbds: list[NbdServer] = []
        self._shared: list[Shared] = []
        self._progress: Progress | None = None
        self._log: int | None = None
        self.places = {
            "bind": self._address.bind,
            "config_dir": self._transfers.path,
            "runtime_dir": os.path.join(self._directory, "state"),
            "admin_bind": "unix:" + os.path.join(self._directory, "admin.sock"),
        }

    def start_nbds(self) -> None:
        """Check all files, then start a qemu-nbd for each that needs one, and close those here."""
        sources: list[Source] = []
        self._stack.callback(_close_all, sources)
        open_sources(self._parsed.files, self._wanted, self._directory, sources)
        sockets = [os.path.join(self._directory, f"{n}.nbd") for n, _ in enumerate(sources)]
        for sock, source in zip(sockets, sources, strict=True):
            if source.direct is None:
                self._nbds.append(NbdServer(source, self._wanted, sock))
                self._stack.callback(self._nbds[-1].close)
        for nbd in self._nbds:
            nbd.wait_until_ready()
            nbd.source.chain.require_as_read(first=int(not self._wanted.read_only))
            nbd.source.close()
        copies = copy_names(self._parsed.files)
        for sock, source, copy in zip(sockets, sources, copies, strict=True):
            self._offer(source, sock, copy)

    def _offer(self, source: Source, sock: str, copy: str) -> None:
        """Make the transfer of an image."""
        name = secrets.token_hex(_ID_BYTES)
        fields: dict[str, object] = {"backend": "nbd", "socket": sock}
        if source.direct is not None:
            fields = {"backend": "file", "file": source.direct, "format": "raw"}
        elif self._wanted.bitmap is not None:
            fields["export_bitmap"] = self._wanted.bitmap
        fields["read_only"] = self._wanted.read_only
        self._transfers.add(transfer_from_fields(name, fields, KINDS))
        self._shared.append(Shared(source, name, f"/images/{name}", copy))

    def start_server(self, serve: Callable[[], object]) -> None:
        """Start the server, and wait until it serves."""
        theirs = None
        if is_shown() and not self._parsed.json:
            self._log, theirs = os.pipe()
            self._stack.callback(os.close, self._log)
        self._server = ImageServer(serve, self._directory, theirs)
        self._stack.callback(self._server.close)
        if theirs is not None:
            os.close(theirs)
        try:
            self._server.wait_until_ready()
        except LocalFailure:
            if self._log is not None and self._server.child.has_ended():
                write(os.read(self._log, 1 << 16).decode("utf-8", "replace"), errors=True)
            raise

    def announce(self, settings: Settings) -> None:
        """Print what can be done now; a signal from here on drains."""
        self._signals.note()
        scheme = "https" if settings.tls_cert else "http"
        cacert = _cacert(settings.tls_cert) if settings.tls_cert else None
        base = f"{scheme}://{self._address.reachable}"
        if not (settings.tls_cert or self._address.is_loopback):
            write(
                f"imageserver: warning: {self._address.host} can be reached by others, and without "
                "TLS they see on the way what is a right to the images: their URLs "
                "(IMAGESERVER_TLS_CERT; docs/security.md)\n",
                errors=True,
            )
        self._shared = [
            replace(each, url=f"{base}{each.url}", cacert=cacert) for each in self._shared
        ]
        for each in self._shared:
            write(each.line(self._wanted) if self._parsed.json else each.text(self._wanted))
        if not self._parsed.json:
            write("Ctrl-C ends it.\n")
        if self._log is not None:
            names = {each.id: os.path.basename(each.source.name) for each in self._shared}
            self._progress = Progress(base, names)
            self._stack.callback(self._progress.close)

    def watch(self) -> int:
        """Wait for the end; return the exit status."""
        session = Session(self._server, self._nbds, self._signals, self._tell, self._lost)
        session.images = len(self._shared)
        return session.run(self._progress, self._log)

    def _tell(self, text: str) -> None:
        line = f"imageserver: {text}\n"
        if self._progress is not None:
            self._progress.print(line)
        else:
            write(line, errors=True)

    def _lost(self, nbd: NbdServer) -> None:
        """Tell of a qemu-nbd that died, and withdraw its image."""
        shared = next(each for each in self._shared if each.source is nbd.source)
        problem = f"its qemu-nbd {plain_text(nbd.end)}"
        self._tell(f"{plain_text(nbd.source.name)} is not shared any more: {problem}")
        if self._parsed.json:
            told = {"file": nbd.source.name, "id": shared.id, "error": problem}
            write(json.dumps(told) + "\n")
        self._transfers.remove(shared.id)


def _close_all(sources: list[Source]) -> None:
    for source in sources:
        source.close()


def _cacert(certificate: str) -> str:
    """Return what clients trust: the CA's certificate beside the server's, or that itself."""
    beside = os.path.join(os.path.dirname(certificate), "ca.crt")
    return beside if os.access(beside, os.R_OK) else certificate
