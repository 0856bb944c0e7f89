# SPDX-License-Identifier: Apache-2.0
"""What holds the bytes of images: NBD servers (``nbd``) and files (``file``)."""
