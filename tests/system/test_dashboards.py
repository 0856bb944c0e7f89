# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alerts before a real Prometheus that watches two servers.

Every query of the dashboard has answers that are not zero, QUIET aside, and so has every alert
without its comparisons. PROVOKED and FIRING alerts notice what was done to the servers.
That each of the others fires, too, test_alerts shows: nobody waits six hours here.
"""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import urllib.parse
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.dashboards import ALERTS, alerts, queries
from tests.system.clients import putting, reading
from tests.system.harness import Server, exchange, free_port, nbdkit, process, qemu_nbd, wait_until
from tests.system.pki import TlsServer, make_pki
from tests.system.skips import beside_python, needs
from tests.system.watching import Admin

pytestmark = needs("prometheus")
SIZE = 64 << 20  # more than the socket buffers of a connection hold
BINARY = {"Content-Type": "application/octet-stream", "Range": "bytes=0-9"}
ZERO = b'{"op":"zero","offset":0,"size":4096}'

#: What nothing was done about: answers are there, but all are zero.
QUIET = {"Connections refused, {{reason}}", "ImageserverConnectionsRefused"}
#: Alerts that must notice what was done, and no others.
PROVOKED = {
    "ImageserverDown",  # a third target, where nobody listens
    "ImageserverNotReady",
    "ImageserverMetricsDamaged",
    "ImageserverClientsRefused",
    "ImageserverLockConflicts",
    "ImageserverTlsHandshakesFail",
}
#: ... and fire, for they have no delay (for).
FIRING = {
    "ImageserverWorkerDied",
    "ImageserverSlotsReclaimed",
    "ImageserverBackendErrors",
    "ImageserverDiskFull",
}


class Prometheus:
    """A real one, at a port of the loopback interface."""

    def __init__(self, port: int) -> None:
        self._port = port

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return self._ask("/-/ready")[0] == 200
        return False

    def values(self, expression: str) -> list[float]:
        """Return the numbers that an expression has now."""
        query = urllib.parse.urlencode({"query": expression})
        status, body = self._ask(f"/api/v1/query?{query}")
        assert status == 200, body
        found = [float(series["value"][1]) for series in json.loads(body)["data"]["result"]]
        return [value for value in found if math.isfinite(value)]

    def rules(self) -> list[dict[str, Any]]:
        (group,) = json.loads(self._ask("/api/v1/rules")[1])["data"]["groups"]
        return list(group["rules"])

    def _ask(self, path: str) -> tuple[int, bytes]:
        with contextlib.closing(HTTPConnection("127.0.0.1", self._port, timeout=30)) as connection:
            answer = exchange(connection, "GET", path)
        return answer.status, answer.body


@contextlib.contextmanager
def prometheus(directory: Path, *targets: int) -> Iterator[Prometheus]:
    """Run Prometheus with the alerts; it scrapes these ports."""
    port = free_port()
    static = [{"targets": [f"127.0.0.1:{target}" for target in targets]}]
    config = directory / "prometheus.yml"
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
                "rule_files": [str(ALERTS)],
                "scrape_configs": [{"job_name": "imageserver", "static_configs": static}],
            }
        )
    )
    command = [
        str(beside_python("prometheus")),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    found = Prometheus(port)
    with process(command, found.is_ready):
        yield found


@pytest.fixture(scope="module")
def watched(workplace: Path) -> Iterator[Prometheus]:
    """A Prometheus that has seen everything happen to two servers, one of them with TLS."""
    (workplace / "image").write_bytes(bytes(1 << 20))
    with (workplace / "big").open("wb") as file:
        file.truncate(SIZE)
    for name in ("plain", "tls"):
        (workplace / name).mkdir()
    full = ("--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=1")
    plain, tls = free_port(), free_port()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        big = enter(qemu_nbd(workplace / "big", export="e"))
        no_room = enter(nbdkit(workplace / "full.sock", *full))
        server = Server(workplace / "plain", admin_bind=f"127.0.0.1:{plain}", max_readers=1)
        server.add("big", socket=str(big), export="e")
        server.add("full", socket=str(no_room))
        server.add("dead", socket=str(workplace / "none.sock"))
        server.add("file", backend="file", file=str(workplace / "image"))
        enter(server)
        pki = make_pki(workplace / "pki")
        other = enter(TlsServer(workplace / "tls", pki, admin_bind=f"127.0.0.1:{tls}", workers=2))
        seen = enter(prometheus(workplace, plain, tls, free_port()))
        work(server)  # once before: a rate needs a number to begin with
        wait_until(lambda: sum(seen.values("imageserver_requests_total")) > 0, 30)
        wait_until(lambda: sum(seen.values("up")) == 2, 30)
        work(server)
        refuse(server)
        # A worker that is killed takes with it what it has counted within the last 0.25 s.
        wait_until(lambda: conflicts(Admin(plain)) == 400)
        kill_a_worker(server, Admin(plain))
        fail_handshakes(other)
        (server.runtime / "metrics" / "counter_9999.db").write_bytes(b"\xff" * 4096)
        other.config.chmod(0o777)
        enter(reading(server, "/images/big"))
        yield seen


def work(server: Server) -> None:
    """Make requests of every operation, most of which succeed."""
    with contextlib.closing(server.connect()) as connection:

        def ask(method: str, path: str, body: bytes | None = None, **fields: str) -> int:
            headers = {name.replace("_", "-"): value for name, value in fields.items()}
            return exchange(connection, method, f"/images/{path}", body, headers).status

        for _ in range(5):
            assert ask("GET", "file") == 200
            assert ask("GET", "big", Range="bytes=0-4194303") == 206
            assert ask("PUT", "file", bytes(1 << 20)) == 200
            assert exchange(connection, "PATCH", "/images/big", bytes(10), BINARY).status == 200
            assert ask("PATCH", "big", ZERO, Content_Type="application/json") == 200
            assert ask("POST", "big/flush") == 200
            assert ask("GET", "big/extents") == 200
            assert ask("OPTIONS", "big") == ask("HEAD", "big") == 200
            assert ask("GET", "none") == 404
            assert ask("GET", "dead") == 500
            assert exchange(connection, "PATCH", "/images/full", bytes(10), BINARY).status == 507


def refuse(server: Server) -> None:
    """Have requests refused for want of a slot, and for a lock that is held; leave at last."""
    connection = server.connect()
    with (
        contextlib.closing(connection),
        reading(server, "/images/big"),
        putting(server, "/images/big", SIZE),
    ):
        for _ in range(50):
            assert exchange(connection, "GET", "/images/file").status == 503
        for _ in range(400):  # more than one a second, over the five minutes of the alert
            assert exchange(connection, "POST", "/images/big/flush").status == 409


def conflicts(admin: Admin) -> float:
    """Return how many requests have met a lock that was held."""
    found = admin.metrics().items()
    return sum(count for name, count in found if name.startswith("lock_conflicts_total"))


def kill_a_worker(server: Server, admin: Admin) -> None:
    wait_until(lambda: admin.metrics()['slots_in_use{kind="read"}'] == 0)
    with contextlib.suppress(OSError), reading(server, "/images/big") as sock:
        os.kill(server.worker_of(sock), signal.SIGKILL)
    wait_until(lambda: admin.metrics()["worker_deaths_total"] == 1, 30)
    wait_until(lambda: admin.metrics()['workers{state="accepting"}'] == 3, 30)


def fail_handshakes(server: TlsServer) -> None:
    for _ in range(40):
        with server.plain(b"GET / HTTP/1.1\r\n\r\n") as sock, contextlib.suppress(OSError):
            assert sock.recv(100)[:1] in {b"", b"\x15"}  # closed, or an alert of TLS


def chosen(query: str) -> str:
    """Return a query as Grafana sends it, for all hosts of the job."""
    for name, value in (("$job", "imageserver"), ("$instance", "127.0.0.1:.*")):
        query = query.replace(name, value)
    return query.replace("$__rate_interval", "1m")


def bare(expression: str) -> str:
    """Return an alert's expression without its comparisons (or its ``absent``)."""
    told = re.sub(r" (?:==|<|>) [\d.]+(?: \* \d+)?(?=\s|$)", "", expression)
    return re.sub(r"^absent\((.*)\)$", r"\1", told)


QUERIES = {name: chosen(query) for name, query in queries().items()} | {
    name: bare(rule["expr"]) for name, rule in alerts().items()
}


def test_nothing_compares_without_its_comparisons():
    assert [name for name, query in QUERIES.items() if re.search(r" [=<>]+ ", query)] == [
        "Progress, {{operation}}"
    ]


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_returns_data(watched, name):
    least = 0 if name in QUIET else math.nextafter(0, 1)
    wait_until(lambda: [value for value in watched.values(QUERIES[name]) if value >= least], 20)


def test_alerts_notice_what_was_done(watched):
    def active(rules: list[dict[str, Any]]) -> set[str]:
        return {rule["name"] for rule in rules if rule["alerts"]}

    wait_until(lambda: active(watched.rules()) == PROVOKED | FIRING, 20)
    assert {rule["name"] for rule in watched.rules() if rule["state"] == "firing"} >= FIRING
    assert {(rule["health"], rule.get("lastError", "")) for rule in watched.rules()} == {("ok", "")}


def test_what_alerts_say_is_whole(watched):
    found = [alert["annotations"] for rule in watched.rules() for alert in rule["alerts"]]
    texts = list(itertools.chain.from_iterable(texts.values() for texts in found))
    assert texts
    assert [text for text in texts if re.search(r"<error|<no value>|: $|\(\)|NaN", text)] == []
