# SPDX-License-Identifier: Apache-2.0
"""The table of kinds: what its rows say agrees, and an image that is written down comes back."""

from pathlib import Path

import pytest

from imageserver.backends.file.kind import RAW, FileImage
from imageserver.backends.nbd.kind import NBD, NbdImage
from imageserver.backends.table import KINDS, TABLE
from imageserver.core.kinds import Image, ImageKind
from imageserver.core.transfer import _COMMON_FIELDS, Transfer, to_fields, transfer_from_fields

kinds = pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.name)


@kinds
def test_what_a_kind_announces_is_not_refused(kind: ImageKind) -> None:
    assert ("PATCH" in kind.methods) is kind.writes_ranges
    assert ("extents" in kind.features) is (not kind.extents_refusal)
    assert ("extents" in kind.read_only_features) is (not kind.extents_refusal)


@kinds
def test_an_image_that_can_be_written_announces_digests(kind: ImageKind) -> None:
    assert "digest" in kind.features
    assert "digest" not in kind.read_only_features


@kinds
def test_a_read_only_image_has_a_part_of_what_a_writable_one_has(kind: ImageKind) -> None:
    assert set(kind.read_only_methods) < set(kind.methods)
    assert set(kind.read_only_features) <= set(kind.features)
    assert not {"PUT", "PATCH"} & set(kind.read_only_methods)


@pytest.mark.parametrize(
    "image",
    [
        FileImage("/a"),
        FileImage("/raw", raw=True, sparse=False),
        NbdImage("/s"),
        NbdImage("/s", "e", "b", flushes_image=True),
    ],
    ids=str,
)
def test_an_image_comes_back_from_its_fields(image: Image) -> None:
    fields = to_fields(Transfer("t", image))

    assert transfer_from_fields("t", fields, KINDS) == Transfer("t", image)
    assert set(image.fields()) == set(image.kind.own_fields)


def test_an_operator_tells_kinds_apart_that_one_backend_has() -> None:
    names = [kind.name for kind in TABLE]
    assert len(set(names)) == len(names)
    assert {kind.backend for kind in TABLE} == set(KINDS)


def test_a_raw_file_has_what_an_nbd_image_has() -> None:
    assert RAW.methods == NBD.methods
    assert RAW.read_only_methods == NBD.read_only_methods
    assert RAW.features == NBD.features
    assert RAW.read_only_features == NBD.read_only_features


def test_the_documentation_has_each_field_of_a_transfer() -> None:
    text = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
    table = text.partition("| field | | meaning |")[2].partition("\n\n")[0]
    rows = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}

    own = {name for kind in TABLE for name in kind.own_fields}
    assert rows == own | set(_COMMON_FIELDS) - {"transfer_id"}  # that is in files of ours alone
