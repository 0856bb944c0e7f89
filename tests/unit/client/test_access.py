# SPDX-License-Identifier: Apache-2.0
"""What a URL and the options beside it say."""

import pytest

from imageserver.client.failures import BadUrl
from imageserver.client.http.access import Access


@pytest.mark.parametrize(
    ("url", "host", "field"),
    [
        ("http://[fe80::1%25eth0]:8080/x", "fe80::1%eth0", "[fe80::1]:8080"),
        ("http://[fe80::1%eth0]/x", "fe80::1%eth0", "[fe80::1]"),
        ("http://[::1]:80/x", "::1", "[::1]:80"),
        ("http://Host:80/x", "host", "Host:80"),
    ],
)
def test_a_zone_is_for_this_side_only(url: str, host: str, field: str):
    access = Access(url)
    assert (access.host, access.host_field) == (host, field)


@pytest.mark.parametrize("rest", ["?format=qcow2", "#top", "/?a=b#c"])
def test_a_query_or_fragment_is_refused_for_options(rest: str):
    with pytest.raises(BadUrl, match=r"^'http://x/images/a/?' is followed .*--format qcow2"):
        Access(f"http://me:secret@x/images/a{rest}")


@pytest.mark.parametrize("option", ["cacert", "cert", "key"])
def test_a_url_without_tls_is_refused_with_options_of_tls(option: str):
    with pytest.raises(BadUrl, match=r"^--cacert, --cert and --key are for https:// URLs"):
        Access("HTTP://x/images/a", **{option: "file"})  # type: ignore[arg-type]
    Access("https://x/images/a", **{option: "file"})  # type: ignore[arg-type]
