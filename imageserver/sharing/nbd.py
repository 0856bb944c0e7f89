# SPDX-License-Identifier: Apache-2.0
"""The private qemu-nbd of a source: for any number of connections, until it is told to end."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from typing import IO

from imageserver.client.failures import LocalFailure
from imageserver.client.local.qemu_programs import death_signal, program
from imageserver.sharing.sources import Source, Wanted, refusal

_START_SECONDS, _STOP_SECONDS = 30.0, 5.0
#: What an NBD server says first (the NBD protocol's magic).
_GREETING = b"NBDMAGIC"
#: How much of what it has printed is looked at, in bytes.
_MAX_SAID = 64 * 1024


class NbdServer:
    """A running qemu-nbd. It is told to end if this process dies."""

    def __init__(self, source: Source, wanted: Wanted, sock: str) -> None:
        self.source = source
        self.socket = sock
        self._names = dict(source.names)
        self._read_only = wanted.read_only
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - see close
        command = [
            program("qemu-nbd"),
            "--persistent",
            "--shared=0",
            f"--socket={sock}",
            "--allocation-depth",
            *(["--read-only"] if wanted.read_only else ["--discard=unmap"]),
            *([f"--bitmap={wanted.bitmap}"] if wanted.bitmap is not None else []),
            *source.options,
            source.filename,
        ]
        self._process = subprocess.Popen(  # noqa: S603 - a list, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._output,
            pass_fds=list(self._names),
            start_new_session=True,  # a terminal's Ctrl-C reaches this process only
            preexec_fn=death_signal(signal.SIGTERM),  # noqa: PLW1509 - there are no threads yet
        )
        #: Readable once it has ended (pidfd_open(2)).
        self.fd = os.pidfd_open(self._process.pid)

    def wait_until_ready(self) -> None:
        """Return when it speaks.

        Raises:
            LocalFailure: it has ended, with its reason, or says nothing.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not self._greets():
            if self.has_ended():
                # It could be read: its header was (``sources``).
                raise refusal(
                    self.source.name, self.said(), self._names, could_be_read=not self._read_only
                )
            if time.monotonic() > deadline:
                raise LocalFailure(f"{self.source.name}: qemu-nbd does not answer")
            time.sleep(0.005)

    def _greets(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(1)
            try:
                sock.connect(self.socket)
                return sock.recv(len(_GREETING)) == _GREETING
            except OSError:
                return False

    def has_ended(self) -> bool:
        """Tell whether it has ended."""
        return self._process.poll() is not None

    def said(self) -> str:
        """Return what it has printed."""
        return os.pread(self._output.fileno(), _MAX_SAID, 0).decode("utf-8", "replace")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        self._process.send_signal(number)

    @property
    def end(self) -> str:
        """How it has ended, in words; its own, if it was not killed."""
        status = self._process.poll() or 0
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        last = self.said().strip().rpartition("\n")[2]
        return f"has ended ({last})" if status and last else "has ended"

    def close(self) -> None:
        """End it if it still runs; may be called twice.

        Politely first: a bitmap of an image that is not closed cannot be used any more.
        """
        self.send(signal.SIGTERM)
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._output.close()
