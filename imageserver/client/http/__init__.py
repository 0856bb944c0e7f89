# SPDX-License-Identifier: Apache-2.0
"""The server's side of a transfer: an image behind HTTP."""
