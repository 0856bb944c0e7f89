# SPDX-License-Identifier: Apache-2.0
"""From imageserver's settings to gunicorn's names; no logic here."""

import math

from imageserver.server import admin_listener, hooks, preconditions

_settings = hooks.load_settings()

wsgi_app = "imageserver.process:create()"
worker_class = "imageserver.server.worker.ImageWorker"
bind = [
    admin_listener.bindable(address)
    for address in (*_settings.bind, *_settings.control_address, *_settings.admin_bind)
]
workers = _settings.workers
threads = _settings.threads
keepalive = int(_settings.keepalive)
# A worker ends its drain by itself; until it has given back what it held, the master waits.
graceful_timeout = math.ceil(_settings.drain_timeout) + 5
# The worker's loop never blocks: one that is silent for this long is stuck.
timeout = 60
worker_tmp_dir = preconditions.heartbeat_directory()
limit_request_line = 8190
limit_request_fields = 100
limit_request_field_size = 8190
# One parser everywhere, whatever happens to be installed.
http_parser = "python"
# No header from anybody changes scheme, path or script name: there is nothing to forward.
forwarded_allow_ips = ""
forwarder_headers = ""
control_socket_disable = True
accesslog = None
errorlog = "-"
loglevel = _settings.log_level
logger_class = "imageserver.server.serverlog.ServerLogger"
proc_name = "imageserver"

on_starting = hooks.on_starting
when_ready = hooks.when_ready
on_reload = hooks.on_reload
pre_exec = hooks.pre_exec
post_fork = hooks.post_fork
child_exit = hooks.child_exit
