# SPDX-License-Identifier: Apache-2.0
"""An HTTP server for virtual disks: NBD exports and image files, read and written over HTTP.

The layers, from the top (imports only point down; ``pyproject.toml`` holds the contract):

    process     wsgi, server/, __main__,     settings in, processes and threads
                records
    web         web/                         HTTP in, operations out
    work        operations, sessions,        bytes move; rights to an image
                inspection, visits,          who uses what; what a control program asks for
                administration
    adapters    settings, registry, locks,   the world outside, one library each
                shared, logs, backends/,
                activity, registrations,
                processes
    vocabulary  errors, ranges, extents,     values and rules, no I/O
                transfers, patches, slots,
                ports, jsontext, control
"""

__version__ = "0.1.0"
