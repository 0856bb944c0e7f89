# SPDX-License-Identifier: Apache-2.0
"""Settings in, application out: everything is put together here, once per worker."""

import os

from imageserver.backends.table import AnyBackend
from imageserver.images.probing import Inspector
from imageserver.images.sessions import Sessions
from imageserver.observability.logs import OperationLog
from imageserver.observability.metrics.counted import LateMetrics
from imageserver.runtime.directory import runtime_in
from imageserver.runtime.locks import ImageLocks, image_key
from imageserver.runtime.processes import is_alive, is_exiting
from imageserver.runtime.slottable import SharedTable
from imageserver.settings import Settings
from imageserver.transfers.files import TransferFiles
from imageserver.transfers.records import records
from imageserver.web.app import App, create_app
from imageserver.web.image_resource import Limits


def create() -> App:
    """Build the application from the environment: gunicorn's ``wsgi_app``, once per worker.

    The slot table opens itself anew after a fork, so that preloading does no harm.
    """
    settings = Settings.from_environ(os.environ)
    freed = LateMetrics(settings.metrics_dir).freed
    runtime = runtime_in(settings.runtime_dir)
    return application(settings, SharedTable(runtime, settings.slot_limits, freed))


def application(settings: Settings, slots: SharedTable) -> App:
    """Build the application for one process."""
    metrics = LateMetrics(settings.metrics_dir)
    backends = AnyBackend(settings)
    files = TransferFiles(settings.config_dir, settings.config_owners, slots.is_first)
    directory = runtime_in(settings.runtime_dir).locks
    locks = ImageLocks(directory, is_exiting, slots.owner, is_alive)
    return create_app(
        records(settings, files).tracker(),
        Sessions(
            *(locks, slots, backends, image_key),
            shares_lock=settings.max_writers > 1,
            meter=metrics,
        ),
        Inspector(backends),
        Limits(settings.max_readers, settings.max_writers, settings.unix_socket),
        journals=(OperationLog(), metrics),
    )
