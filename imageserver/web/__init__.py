# SPDX-License-Identifier: Apache-2.0
"""HTTP in, operations out: routes, responders, bodies, and the one table of errors."""
