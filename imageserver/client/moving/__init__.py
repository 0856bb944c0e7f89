# SPDX-License-Identifier: Apache-2.0
"""Moving images: download, upload, their plan, threads, resumption and verification."""
