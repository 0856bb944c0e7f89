# SPDX-License-Identifier: Apache-2.0
"""The record of a transfer's use, as bytes: see ``usage.py`` for who writes it when.

    8s magic   16s boot   Q touched   Q cut   Q closed   Q read   Q written   256s error   256s id
    Q changed

Times are of the monotonic clock, but for ``changed``: the time of change of the control program's
file as it was last used. It tells the file's states apart, and is compared with no clock.
"""

import struct
from dataclasses import dataclass

from imageserver.core.ports import Account

_RECORD = struct.Struct("<8s16sQQQQQ256s256sQ")
SIZE = _RECORD.size
_MAGIC = b"imgactv1"
_BOOT = slice(8, 24)
#: Where a record's parts begin.
TOUCHED, CUT, CLOSED, ACCOUNT, ID, CHANGED = 24, 32, 40, 48, 320, 576
_SUMS = struct.Struct("<QQ256s")
_NAME = struct.Struct("256s")
_WORD = struct.Struct("<Q")
_MOST = (1 << 64) - 1
#: A record of an older version ends here, without ``changed``.
_LEAST = CHANGED


class DamagedRecord(Exception):
    """The bytes are no record, or a record of another boot."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a transfer's use."""

    touched_ns: int
    cut_ns: int
    is_closed: bool
    account: Account
    transfer_id: str
    changed_ns: int


def fresh_record(touched_ns: int, transfer_id: str) -> Record:
    """Return the record of a transfer that is used for the first time."""
    return Record(
        touched_ns, 0, is_closed=False, account=Account(), transfer_id=transfer_id, changed_ns=0
    )


def parse_record(data: bytes, boot: bytes, now_ns: int) -> Record:
    """Parse the bytes of a record, read before ``now_ns``.

    Raises:
        DamagedRecord: they are cut short, not of this boot, or of a time in the future.
    """
    if len(data) < _LEAST or data[: _BOOT.stop] != _MAGIC + boot:
        raise DamagedRecord
    fields = _RECORD.unpack(data[:SIZE].ljust(SIZE, b"\0"))
    touched_ns, cut_ns, closed, read, written, error, name, changed_ns = fields[2:]
    if touched_ns > now_ns:
        raise DamagedRecord
    account = Account(read, written, _text(error) or None)
    return Record(touched_ns, cut_ns, bool(closed), account, _text(name), changed_ns)


def is_of_another_boot(data: bytes, boot: bytes) -> bool:
    """Tell whether this is a record of an earlier boot."""
    head, known = data[: _BOOT.stop], _MAGIC + boot
    return len(head) == len(known) and head.startswith(_MAGIC) and head != known


def pack_record(record: Record, boot: bytes) -> bytes:
    """Return a record's bytes."""
    words = (record.touched_ns, record.cut_ns, int(record.is_closed))
    sums, name = pack_account(record.account), pack_id(record.transfer_id)
    return b"".join(
        (_MAGIC, boot, *map(pack_word, words), sums, name, pack_word(record.changed_ns))
    )


def pack_account(account: Account) -> bytes:
    """Return the bytes at ``ACCOUNT``."""
    error = (account.last_error or "").encode(errors="replace")[:256]
    return _SUMS.pack(min(account.bytes_read, _MOST), min(account.bytes_written, _MOST), error)


def pack_id(transfer_id: str) -> bytes:
    """Return the bytes at ``ID``."""
    return _NAME.pack(transfer_id.encode())


def pack_word(value: int) -> bytes:
    """Return the bytes of a time or flag."""
    return _WORD.pack(value & _MOST)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
