# SPDX-License-Identifier: Apache-2.0
"""Image files: read as they are, replaced as a whole."""
