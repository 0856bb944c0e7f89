# SPDX-License-Identifier: Apache-2.0
"""NBD exports through libnbd, with several requests in flight.

kind       what a transfer says of an export, what can be done with one
exports    opens an export: a ``ports.Backend`` made of the parts below
link       one connection: the only importer of libnbd, its errors translated
failures   what those errors are for us
transfer   reading and writing through a ring of buffers, on a thread of its own
zeroing    write-zeroes in the largest steps a server takes well
status     block status, as extents
peers      what a server still holds of clients that died
"""
