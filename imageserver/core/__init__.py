# SPDX-License-Identifier: Apache-2.0
"""Values and rules, the vocabulary of all other packages: no I/O, no clock, no thread."""
