# SPDX-License-Identifier: Apache-2.0
"""An HTTP server for virtual disks: NBD exports and image files, read and written over HTTP.

The layers, each importing only what stands below it (``pyproject.toml`` holds the contract):

    __main__                   the imageserver command
    sharing                    share: from files to URLs, by one command
    client, server             imagectl; gunicorn: processes, connections, threads
    process                    what one process is made of, put together
    web                        HTTP in, operations out
    images                     the right to an image, and what is done with it
    transfers                  which ids count
    observability              logs and metrics
    backends                   the bytes of images: one table has the kinds
    runtime                    what processes share
    settings                   every setting, declared once
    core                       values and rules; no I/O, no clock, no threads
"""

__version__ = "0.2.0"
