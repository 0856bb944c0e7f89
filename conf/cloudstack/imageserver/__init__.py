# SPDX-License-Identifier: Apache-2.0
"""Not imageserver itself, but what starts it: see ``__main__``."""
