# SPDX-License-Identifier: Apache-2.0
"""One request's right to one image, and what is done with it."""
