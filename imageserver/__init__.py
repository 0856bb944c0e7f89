# SPDX-License-Identifier: Apache-2.0
"""An HTTP server for virtual disks: NBD exports and image files, read and written over HTTP.

The layers, each importing only what stands below it (``pyproject.toml`` holds the contract):

    __main__, client           the command lines; imagectl uses core alone
    server                     gunicorn: processes, connections, threads
    process                    one process's application, put together
    web                        HTTP in, operations out
    images                     the right to an image, and what is done with it
    transfers                  which ids count
    backends, observability    the bytes of images; logs and metrics
    runtime                    what processes share
    settings                   every setting, declared once
    core                       values and rules; no I/O, no clock, no threads
"""

__version__ = "0.1.0"
