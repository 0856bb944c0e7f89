# SPDX-License-Identifier: Apache-2.0
"""The benchmark: see ``scripts/bench`` and ``docs/performance.md``.

__main__   arguments, the order of rows, exit status
rows_*     what is measured, against what, with which target
world      directories, images and servers of one run
clients    HTTP clients in processes of their own; client.py is what they run
readers    long reads, and which worker has which
watching   the CPU time and memory of processes
reference  the synchronous server to compare with; constant: the Falcon responder
verify     whether the bytes are the right ones
figures    ratios, medians, pass or fail; report: the table
"""
