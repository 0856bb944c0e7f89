# SPDX-License-Identifier: Apache-2.0
"""What ``gunicorn``, started in this directory, serves and how: see ``server/configuration.py``."""

from imageserver.server.configuration import from_environment

globals().update(from_environment())
