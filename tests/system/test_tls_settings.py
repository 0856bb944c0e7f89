# SPDX-License-Identifier: Apache-2.0
"""Settings of TLS that cannot work stop the server, with one sentence that says why."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.harness import GUNICORN, ROOT
from tests.system.pki import files

#: What is wrong: settings made of a PKI, and what the sentence must name.
WRONG = {
    "key without certificate": (
        lambda pki: {"tls_key": pki / "server.key"},
        ["IMAGESERVER_TLS_KEY", "IMAGESERVER_TLS_CERT is not"],
    ),
    "client CA without certificate": (
        lambda pki: {"tls_client_ca": pki / "ca.crt"},
        ["IMAGESERVER_TLS_CLIENT_CA", "IMAGESERVER_TLS_CERT is not"],
    ),
    "relative path": (lambda _: {"tls_cert": "server.crt"}, ["TLS_CERT", "absolute path"]),
    "no certificate": (
        lambda pki: files(pki) | {"tls_cert": pki / "none"},
        ["IMAGESERVER_TLS_CERT=", "/none cannot be read (No such file or directory)"],
    ),
    "no key": (
        lambda pki: files(pki) | {"tls_key": pki / "none"},
        ["IMAGESERVER_TLS_KEY=", "cannot be read (No such file or directory)"],
    ),
    "certificate alone": (
        lambda pki: {"tls_cert": pki / "server.crt"},
        ["IMAGESERVER_TLS_CERT=", "no unencrypted private key"],
    ),
    "certificate is a key": (
        lambda pki: files(pki) | {"tls_cert": pki / "server.key"},
        ["IMAGESERVER_TLS_CERT=", "holds no PEM certificate"],
    ),
    "key is a certificate": (
        lambda pki: files(pki) | {"tls_key": pki / "server.crt"},
        ["IMAGESERVER_TLS_KEY=", "no unencrypted private key"],
    ),
    "key of another certificate": (
        lambda pki: files(pki) | {"tls_key": pki / "client.key"},
        ["IMAGESERVER_TLS_KEY=", "does not belong to the certificate"],
    ),
    "key has a password": (
        lambda pki: files(pki) | {"tls_key": _encrypted(pki / "server.key")},
        ["IMAGESERVER_TLS_KEY=", "no unencrypted private key"],
    ),
    "client CA is a directory": (
        lambda pki: files(pki) | {"tls_client_ca": pki},
        ["IMAGESERVER_TLS_CLIENT_CA=", "cannot be read"],
    ),
    "client CA is a key": (
        lambda pki: files(pki) | {"tls_client_ca": pki / "ca.key"},
        ["IMAGESERVER_TLS_CLIENT_CA=", "holds no PEM certificate"],
    ),
}


def _encrypted(key: Path) -> Path:
    locked = key.with_suffix(".locked")
    command = ["openssl", "pkey", "-in", str(key), "-aes128", "-passout", "pass:x"]
    subprocess.run([*command, "-out", str(locked)], check=True)
    return locked


@pytest.mark.parametrize(
    "command",
    [[sys.executable, "-m", "imageserver", "--check"], [str(GUNICORN)]],
    ids=["check", "serve"],
)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_one_sentence(home, pki, name, command):
    make, words = WRONG[name]
    done = start(command, home, make(pki))
    assert done.returncode not in {0, -6, -11}, done
    lines = [line for line in done.stderr.splitlines() if line and "[INFO]" not in line]
    assert len(lines) == 1, lines
    assert re.fullmatch(r"imageserver: .*\.", lines[0])
    assert [word for word in words if word not in lines[0]] == []


def test_a_worker_class_without_tls_is_refused(home, pki):
    done = start([str(GUNICORN), "--worker-class", "gthread"], home, files(pki))
    assert done.returncode != 0
    assert "IMAGESERVER_TLS_CERT is set, but only the worker class" in done.stderr


def start(
    command: list[str], home: Path, settings: dict[str, object]
) -> subprocess.CompletedProcess[str]:
    settings = {"runtime_dir": home / "run", "config_dir": home / "none"} | settings
    env = {name: text for name, text in os.environ.items() if not name.startswith("IMAGESERVER_")}
    env |= {f"IMAGESERVER_{name.upper()}": str(value) for name, value in settings.items()}
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30, check=False
    )
