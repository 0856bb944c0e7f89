# SPDX-License-Identifier: Apache-2.0
"""What one process of the server is made of, put together here and nowhere else.

``Process`` is made once per process, in a worker after the fork, from settings that are handed
in. Its attributes are in the order in which they build on each other; each is made when it is
first used, so that the master, which serves nothing, has the few that it needs.
"""

import os
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from imageserver.backends.table import AnyBackend
from imageserver.core.kinds import Image
from imageserver.core.ports import Owned
from imageserver.core.slots import CAPACITY, Holder, Kind
from imageserver.core.transfer import Transfer
from imageserver.images.mapping import Mapper
from imageserver.images.probing import Inspector
from imageserver.images.sessions import Sessions
from imageserver.observability.logs import OperationLog
from imageserver.observability.metrics.counted import Metrics, metrics_in
from imageserver.observability.recent import Recent
from imageserver.runtime.directory import RuntimeDirectory, runtime_in
from imageserver.runtime.locks import ImageLocks, image_key
from imageserver.runtime.marks import Marks
from imageserver.runtime.slottable import SharedTable
from imageserver.settings import MAX_WORKERS, Settings
from imageserver.transfers.actions import Administration
from imageserver.transfers.fileage import file_age
from imageserver.transfers.files import TransferFiles
from imageserver.transfers.holding import Holding
from imageserver.transfers.lookup import Catalogue
from imageserver.transfers.registered import RegistrationFiles
from imageserver.transfers.tracking import Tracker
from imageserver.transfers.usage import ActivityFiles
from imageserver.web.app import App, create_app
from imageserver.web.image_resource import Limits


class Process:
    """The objects of the master, or of one worker: one slot table, one catalogue, ..."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    # What processes share

    @cached_property
    def runtime(self) -> RuntimeDirectory:
        """The runtime directory, which the master has opened and its workers inherit."""
        return runtime_in(self.settings.runtime_dir)

    @cached_property
    def metrics(self) -> Metrics:
        """The counters of this process."""
        return metrics_in(self.settings.metrics_dir)

    @cached_property
    def recent(self) -> Recent:
        """What this process has done lately, for operators."""
        return Recent(self.metrics.path_of)

    @cached_property
    def slot_limits(self) -> dict[Kind, int]:
        """How many slots of each limited kind there are."""
        readers, writers = self.settings.max_readers, self.settings.max_writers
        others = CAPACITY - readers - writers - MAX_WORKERS
        return {Kind.READ: readers, Kind.WRITE: writers, Kind.OTHER: others}

    @cached_property
    def image_limits(self) -> dict[Kind, int]:
        """How many slots of a kind one image may have, where that is less than there are."""
        settings = self.settings
        most = {Kind.READ: settings.readers_of_image, Kind.WRITE: settings.writers_of_image}
        return {kind: number for kind, number in most.items() if number < self.slot_limits[kind]}

    @cached_property
    def slots(self) -> SharedTable:
        """The slot table, mapped at first use."""
        limits, per_image = self.slot_limits, self.image_limits
        return SharedTable(self.runtime, limits, self._count_freed, per_image=per_image)

    def _count_freed(self, holder: Holder | None) -> None:
        self.metrics.freed(holder)

    @cached_property
    def locks(self) -> ImageLocks:
        """The lock files of images."""
        return ImageLocks(self.runtime.locks, self.slots.gives_way)

    # Transfers

    @cached_property
    def files(self) -> TransferFiles:
        """The transfers in the config directory, with the cache of what was read there."""
        return TransferFiles(
            self.settings.config_dir, self.settings.config_owners, self.slots.is_first
        )

    @cached_property
    def usage(self) -> ActivityFiles:
        """The use of transfers that can expire."""
        return ActivityFiles(self.settings.activity_dir)

    @cached_property
    def registrations(self) -> RegistrationFiles:
        """The transfers that were registered over the control socket."""
        directory = self.settings.registered_dir
        return RegistrationFiles(directory, self.usage, self.runtime.registered.require)

    @cached_property
    def catalogue(self) -> Catalogue:
        """All transfers, by id."""
        # Without a control socket registrations do not count: nobody could unregister them.
        registered = self.registrations if self.settings.control_socket else None
        require = self.runtime.require_records
        return Catalogue(self.files, registered, self.usage, file_age(), require)

    @cached_property
    def administration(self) -> Administration:
        """Carries out what a control program asks for."""
        settings = self.settings
        return Administration(
            self.registrations,
            self.usage,
            self.catalogue,
            settings.idle_timeout,
            default_wait=settings.unregister_timeout,
        )

    def recover_transfers(self) -> None:
        """Repair the records of transfers of earlier servers; before any process serves."""
        self.registrations.recover()
        self.prune_transfers()

    def prune_transfers(self) -> None:
        """Remove the records of transfers that no longer exist."""
        if self.runtime.problem():
            return
        self.registrations.prune(self.files.has)
        self.usage.prune(Owned.FILE, self.files.has)

    # Images

    @cached_property
    def backends(self) -> AnyBackend:
        """What opens images of every kind; it needs libnbd, which the master does not load."""
        return AnyBackend(self.settings, Holding(self.catalogue, Marks(self.runtime)))

    def drain(self) -> None:
        """Close what is kept for later requests: this process is about to end."""
        if "backends" in self.__dict__:
            self.backends.drain()

    @cached_property
    def mapper(self) -> Mapper:
        """What draws images for operators."""
        return Mapper(self.backends, self._users)

    def _users(self, image: Image, transfer_id: str) -> set[tuple[int, int]]:
        """Return which operations use an image or a transfer now."""
        key = image_key(image)
        return {
            (row.owner.pid, row.started_ns)
            for row in self.slots.holders(Kind.READ, Kind.WRITE, Kind.OTHER)
            if key == row.image or row.transfer == transfer_id
        }

    def look_up(self, transfer_id: str) -> Transfer:
        """Return a transfer without using it: see ``Catalogue.find``."""
        found = self.catalogue.find(transfer_id, visit=False)
        if found.activity:
            found.activity.close()
        return found.transfer

    @cached_property
    def application(self) -> App:
        """The WSGI application that serves images."""
        settings = self.settings
        return create_app(
            Tracker(self.catalogue, self.prune_transfers),
            Sessions(
                *(self.locks, self.slots, self.backends, image_key),
                shares_lock=settings.writers_of_image > 1,
                counts_readers=Kind.READ in self.image_limits,
                meter=self.metrics,
            ),
            Inspector(self.backends),
            Limits(settings.readers_of_image, settings.writers_of_image, settings.unix_socket),
            journals=(OperationLog(), self.metrics, self.recent),
            origins=settings.cors_origins,
            put_flushes=settings.put_flush,
            underway=self.recent.underway,
        )


def create() -> Callable[..., Iterable[bytes]]:
    """Return the application, with settings from the environment: for any WSGI server.

    It is built with the first request: with gunicorn's ``preload_app`` this function runs in the
    master, before the fork and before the metrics directory exists. ``ImageWorker`` does not
    call it.
    """
    process = Process(Settings.from_environ(os.environ))

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        return process.application(environ, start_response)

    return application
