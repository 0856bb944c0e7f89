# SPDX-License-Identifier: Apache-2.0
"""The load test: the usual clients of an image server, as locust users.

    locust --HTTP--> imageserver --NBD--> qemu-nbd
      |                  ^
      +---- transfer files, control socket
      v
    ledger: was this refusal due?    model (lab): were these the bytes?

__main__    arguments, and the verdict (``scripts/load``)
world       a server, its images, and locust over them
parameters  what a run is told: which images, what may be written
run         what its users share
users       who probes and backs up
writers     who restores
control     who makes, changes and ends transfers
client      one connection; judges every answer, and tells locust
images      what each image must contain
ledger      which refusals the limits explain; no I/O
report      the table of a run, and what it must have done

``scripts/locustfile.py`` puts it together for locust. Everything runs in one process, for the
ledger must know of every request. gevent patches that process: nothing else imports
``locustfile`` or the users.
"""
