# SPDX-License-Identifier: Apache-2.0
"""``imagectl``: moves, shows and watches images from the command line (docs/imagectl.md).

The layers, from the top (imports only point down; ``pyproject.toml`` holds the contract):

    command line  __main__, cli, commands_*   arguments in, sentences and exit statuses out
    work          download, upload, checks*   one operation each; print nothing
                  movers, verify              the threads; do both sides hold the same?
    ends          remote, transport, probe    a server: the only user of urllib3
                  localfile, qcow2, resume    a raw file; a qcow2 one; what is done of it
                  progress, terminal          a bar, or lines; what a terminal can show
                  svg, control                a drawing; a control socket
    values        plan, backoff, picture,     rules; of no image, no clock of their own
                  table, units, errors

Of the server it knows the vocabulary only, so that it talks to any server like it.
"""
