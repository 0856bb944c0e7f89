# SPDX-License-Identifier: Apache-2.0
"""``imagectl``: moves, shows and watches images from the command line (docs/imagectl.md).

    commands/            arguments in, sentences and exit statuses out
    moving/  checking/   one operation each, which prints nothing
    http/ local/ showing/
                         an image behind HTTP, one on this side, what people see
    backoff plan         when to try again; extents to pieces of one request each
    pace                 the least rate of an answer
    failures             what can go wrong, with exit statuses
    interrupts           Ctrl-C at any moment of a command

Imports only point down (``pyproject.toml``). Of the server it imports ``core`` and the table
of kinds, so that it talks to any server like it.
"""
