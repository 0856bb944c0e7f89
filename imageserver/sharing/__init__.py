# SPDX-License-Identifier: Apache-2.0
"""``imageserver share``: from image files to URLs, by one command, until Ctrl-C.

    share --fork--> imageserver's master --fork--> workers      one for all FILEs
          --fork--> qemu-nbd                                    one for each FILE that is not raw

    command    the command line; everything in its order
    sources    what a FILE is, checked before anything is started
    image_lock QEMU's lock of a raw file
    nbd        the private qemu-nbd of a source
    serving    the image server, as a child
    place      the address, and the directory of this run
    session    signals, deaths, the end
    progress   running transfers, on a terminal
    shown      what is printed of each FILE
    processes  children that end with their parent

A child gets a signal when its parent dies, whatever kills it (``processes``). Nothing here imports
the server: ``imageserver.__main__`` passes it in.
"""
