# SPDX-License-Identifier: Apache-2.0
"""scripts/make-pki: what it makes, keeps and renews."""

import ssl
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "make-pki"
NAMES = [f"{name}.{kind}" for name in ("ca", "client", "server") for kind in ("crt", "key")]


def make(directory: Path, *names: str) -> dict[str, bytes]:
    subprocess.run([SCRIPT, directory, *names], check=True, capture_output=True)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def verify(directory: Path, name: str, *options: str) -> bool:
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", *options, f"{name}.crt"]
    return subprocess.run(command, cwd=directory, check=False, capture_output=True).returncode == 0


def test_it_makes_pairs_that_only_their_owner_reads(tmp_path):
    directory = tmp_path / "new" / "pki"
    assert sorted(make(directory)) == NAMES
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    for name in ("ca", "client", "server"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / f"{name}.crt", directory / f"{name}.key")


def test_each_certificate_serves_its_purpose_only(tmp_path):
    make(tmp_path, "vm.example", "192.0.2.1", "2001:db8::1")
    assert verify(tmp_path, "server", "-purpose", "sslserver", "-verify_hostname", "vm.example")
    assert verify(tmp_path, "server", "-verify_ip", "192.0.2.1")
    assert verify(tmp_path, "server", "-verify_ip", "2001:db8::1")
    assert not verify(tmp_path, "server", "-verify_hostname", "localhost")
    assert not verify(tmp_path, "server", "-purpose", "sslclient")
    assert verify(tmp_path, "client", "-purpose", "sslclient")
    assert not verify(tmp_path, "client", "-purpose", "sslserver")


def test_a_second_run_changes_nothing(tmp_path):
    assert make(tmp_path) == make(tmp_path)


@pytest.mark.parametrize("name", ["server.crt", "server.key"])
def test_what_is_removed_is_renewed_by_the_same_ca(tmp_path, name):
    before = make(tmp_path)
    (tmp_path / name).unlink()
    after = make(tmp_path)
    assert sorted(after) == NAMES
    assert [name for name in NAMES if after[name] != before[name]] == ["server.crt", "server.key"]
    assert verify(tmp_path, "server")


def test_a_new_ca_signs_anew(tmp_path):
    before = make(tmp_path)
    (tmp_path / "ca.key").write_text("damaged")
    after = make(tmp_path)
    assert [name for name in NAMES if after[name] == before[name]] == []
    assert verify(tmp_path, "server")
    assert verify(tmp_path, "client")


def test_without_a_directory_it_says_how_it_is_used():
    done = subprocess.run([SCRIPT], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "make-pki: usage: make-pki DIR [NAME...]\n")
