# SPDX-License-Identifier: Apache-2.0
"""What a transfer says of a file: which kind of image it is."""

import pytest

from imageserver.backends.file.kind import FILE, RAW, FileImage
from imageserver.backends.table import KINDS
from imageserver.core.transfer import InvalidTransfer, to_fields, transfer_from_fields

NAMED = {"backend": "file", "file": "/disk"}


@pytest.mark.parametrize(
    ("fields", "image"),
    [
        ({}, FileImage("/disk")),
        ({"format": None}, FileImage("/disk")),
        ({"format": "opaque"}, FileImage("/disk")),
        ({"format": "opaque", "sparse": 0}, FileImage("/disk")),
        ({"format": "raw"}, FileImage("/disk", raw=True)),
        ({"format": "raw", "sparse": True}, FileImage("/disk", raw=True)),
        ({"format": "raw", "sparse": False}, FileImage("/disk", raw=True, sparse=False)),
    ],
)
def test_the_format_says_whether_a_file_is_a_disk(
    fields: dict[str, object], image: FileImage
) -> None:
    transfer = transfer_from_fields("t", NAMED | fields, KINDS)

    assert transfer.image == image
    assert image.kind is (RAW if image.raw else FILE)
    assert len(transfer.ignored) == (not image.raw and "sparse" in fields)
    assert transfer_from_fields("t", to_fields(transfer), KINDS) == transfer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({"format": name}, '"format" must be "raw" or "opaque"')
            for name in ("qcow2", "RAW", "")
        ),
        ({"format": 1}, '"format" must be a string'),
        ({"format": "raw", "sparse": 0}, '"sparse" must be true or false'),
    ],
)
def test_any_other_format_is_refused_with_the_field_and_its_values(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidTransfer, match=f"^{message}$"):
        transfer_from_fields("t", NAMED | fields, KINDS)


def test_a_raw_and_an_opaque_image_of_one_file_are_no_equals() -> None:
    assert FileImage("/disk") != FileImage("/disk", raw=True)
