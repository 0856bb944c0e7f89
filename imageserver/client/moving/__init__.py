# SPDX-License-Identifier: Apache-2.0
"""Moving images: one operation each.

    download  upload
    target                         the file that a download fills
    wanted  file_locks  resume     what is refused; who has the file; what of it is done
    layout  movers  verify         where data is; the threads; do both sides hold the same?

Nothing here prints: a ``Watcher`` is told how far the operation is.
"""
