# SPDX-License-Identifier: Apache-2.0
"""What the server knows of transfers, put together from the settings.

Every process has its own, over the same files: the application to look ids up, the control
socket to change what is registered, the master to tidy up at start.
"""

from dataclasses import dataclass

from imageserver.core.ports import Owned
from imageserver.runtime.directory import runtime_in
from imageserver.settings import Settings
from imageserver.transfers.actions import Administration
from imageserver.transfers.files import TransferFiles
from imageserver.transfers.lookup import Catalogue
from imageserver.transfers.registered import RegistrationFiles
from imageserver.transfers.tracking import Tracker
from imageserver.transfers.usage import ActivityFiles


@dataclass(frozen=True, slots=True)
class Records:
    """The files in which transfers and their use are written down."""

    settings: Settings
    files: TransferFiles
    activities: ActivityFiles
    registrations: RegistrationFiles

    def tracker(self) -> Tracker:
        """Return who lets requests in to transfers."""
        return Tracker(self._catalogue(), self.prune)

    def administration(self) -> Administration:
        """Return who carries out what a control program asks for."""
        idle = self.settings.idle_timeout
        return Administration(self.registrations, self.activities, self._catalogue(), idle)

    def _catalogue(self) -> Catalogue:
        # What was registered once stays unknown as long as nobody can unregister it.
        registered = self.registrations if self.settings.control_socket else None
        runtime = runtime_in(self.settings.runtime_dir)
        return Catalogue(self.files, registered, self.activities, require=runtime.require_records)

    def recover(self) -> None:
        """Put in order what earlier servers have left; before any process serves."""
        self.registrations.recover()
        self.prune()

    def prune(self) -> None:
        """Remove what is left of transfers that are known no more."""
        if runtime_in(self.settings.runtime_dir).problem():
            return
        self.registrations.prune(self.files.has)
        self.activities.prune(Owned.FILE, self.files.has)


def records(settings: Settings, files: TransferFiles) -> Records:
    """Name all files; none is opened yet."""
    runtime = runtime_in(settings.runtime_dir)
    activities = ActivityFiles(settings.activity_dir)
    registrations = RegistrationFiles(
        settings.registered_dir, activities, runtime.registered.require
    )
    return Records(settings, files, activities, registrations)
