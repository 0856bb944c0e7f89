# SPDX-License-Identifier: Apache-2.0
"""Which transfer an id names, where it cannot be told what is registered."""

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import StateUnavailable, UnknownImage
from imageserver.core.ports import Activity, Owned
from imageserver.core.transfer import Transfer
from imageserver.transfers.lookup import Catalogue, Found

PLAIN = Transfer("plain", FileImage("/images/plain"))
EXPIRING = Transfer("expiring", FileImage("/images/expiring"), idle_seconds=60)


class _Files:
    def get(self, transfer_id: str) -> Transfer:
        for transfer in (PLAIN, EXPIRING):
            if transfer.id == transfer_id:
                return transfer
        raise UnknownImage(transfer_id)


class _Nothing:
    """Nothing is registered, nor in use."""

    def get(self, transfer_id: str) -> Transfer:
        raise UnknownImage(transfer_id)

    def find(self, _owned: Owned, _transfer_id: str, *, visit: bool) -> Activity | None:
        assert visit
        return None

    def make(self, _owned: Owned, _transfer_id: str) -> Activity:
        raise AssertionError


def _lost() -> None:
    raise StateUnavailable("the directory was removed")


def _catalogue(*, registers: bool) -> Catalogue:
    registered = _Nothing() if registers else None
    return Catalogue(_Files(), registered, _Nothing(), lambda: 0, _lost)


@pytest.mark.parametrize("name", ["plain", "expiring", "none"])
def test_any_id_may_be_registered_unseen(name: str) -> None:
    with pytest.raises(StateUnavailable):
        _catalogue(registers=True).find(name)


def test_where_nothing_can_be_registered_files_count() -> None:
    catalogue = _catalogue(registers=False)

    assert catalogue.find("plain") == Found(PLAIN, None)
    with pytest.raises(UnknownImage):
        catalogue.find("none")
    with pytest.raises(StateUnavailable):  # it may have expired
        catalogue.find("expiring")


def test_a_probe_is_answered_from_a_file() -> None:
    catalogue = _catalogue(registers=True)

    assert catalogue.find("plain", probes=True) == Found(PLAIN, None)
    assert catalogue.find("expiring", probes=True) == Found(EXPIRING, None)
    with pytest.raises(StateUnavailable):
        catalogue.find("none", probes=True)
