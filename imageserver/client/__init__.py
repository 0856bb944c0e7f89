# SPDX-License-Identifier: Apache-2.0
"""``imagectl``: moves, shows and watches images from the command line (docs/imagectl.md).

The layers, from the top (imports only point down; ``pyproject.toml`` holds the contract):

    command line  __main__, cli, commands_*   arguments in, sentences and exit statuses out
    work          download, upload            one operation each; prints nothing
    moving        movers                      the threads: pieces, retries, cancelling
    ends          remote, transport           an image behind HTTP: the only user of urllib3
                  localfile, qcow2, resume    a raw file; a qcow2 one; what is done of it
    values        plan, backoff, errors       rules; no I/O, no clock, no threads

Of the server it knows the vocabulary only, so that it talks to any server like it.
"""
