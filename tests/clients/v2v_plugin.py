# SPDX-License-Identifier: Apache-2.0
"""A plugin for nbdkit that uploads a disk, in the way in which virt-v2v's plugin for oVirt does.

It asks OPTIONS what it may do, opens as many connections as it was offered, and turns what
nbdcopy writes into PUT with Content-Range, PATCH zero and PATCH flush. nbdkit's own Python runs
this: it may be any version, and imports the standard library alone.
"""

import http.client
import json
import queue
from contextlib import contextmanager
from urllib.parse import urlsplit

import nbdkit  # type: ignore[import-not-found]  # nbdkit itself provides it

API_VERSION = 2
#: Most connections, whatever the server offers.
_MOST = 8
_SETTINGS = {}


def config(key, value):
    """Take ``url`` and ``size``, in bytes."""
    _SETTINGS[key] = value


def thread_model():
    """Serve requests side by side."""
    return nbdkit.THREAD_MODEL_PARALLEL


class _Disk:
    def __init__(self):
        self.path = urlsplit(_SETTINGS["url"]).path
        first = _connect()
        first.request("OPTIONS", self.path)
        self.offered = json.loads(_answer(first))
        self.pool = queue.Queue()
        for _ in range(min(_MOST, self.offered["max_readers"], self.offered["max_writers"])):
            self.pool.put(_connect())
        first.close()


def _connect():
    address = urlsplit(_SETTINGS["url"])
    return http.client.HTTPConnection(address.hostname, address.port)


def _answer(connection):
    answer = connection.getresponse()
    body = answer.read()
    if answer.status not in (200, 206):
        raise RuntimeError(f"{answer.status} {body[:200]!r}")
    return body


def open(_readonly):  # noqa: A001 - nbdkit's name
    return _Disk()


def get_size(_disk):
    return int(_SETTINGS["size"])


def can_zero(disk):
    return "zero" in disk.offered["features"]


def can_flush(disk):
    return "flush" in disk.offered["features"]


def can_multi_conn(_disk):
    return True


@contextmanager
def _one_of(disk):
    connection = disk.pool.get()
    try:
        yield connection
    finally:
        disk.pool.put(connection)


def pread(disk, buf, offset, _flags):
    last = offset + len(buf) - 1
    with _one_of(disk) as connection:
        connection.request("GET", disk.path, headers={"Range": f"bytes={offset}-{last}"})
        buf[:] = _answer(connection)


def pwrite(disk, buf, offset, _flags):
    last = offset + len(buf) - 1
    with _one_of(disk) as connection:
        where = {"Content-Range": f"bytes {offset}-{last}/*"}
        connection.request("PUT", disk.path, body=bytes(buf), headers=where)
        _answer(connection)


def zero(disk, count, offset, _flags):
    _patch(disk, {"op": "zero", "offset": offset, "size": count, "flush": False})


def flush(disk, _flags):
    _patch(disk, {"op": "flush"})


def _patch(disk, what):
    with _one_of(disk) as connection:
        as_json = {"Content-Type": "application/json"}
        connection.request("PATCH", disk.path, body=json.dumps(what), headers=as_json)
        _answer(connection)


def close(disk):
    while not disk.pool.empty():
        disk.pool.get().close()
