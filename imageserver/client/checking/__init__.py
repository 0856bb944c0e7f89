# SPDX-License-Identifier: Apache-2.0
"""Checks of a server: what it announces, tried.

    read_checks  write_checks      one function for each promise
    extent_checks
    findings                       what a check is given, how it may end
    probe                          one connection that sends exactly what it is told

Nothing here prints.
"""
