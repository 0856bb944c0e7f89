# SPDX-License-Identifier: Apache-2.0
"""This side of a transfer: raw files, qcow2 by a private qemu-nbd, the control socket."""
