# SPDX-License-Identifier: Apache-2.0
"""imagectl's command line: one module for each command parses its options and prints its result.

    cli                            runs one command, reports its error
    download upload map info ...   imported when they are used; none knows another
    options  outputs               what they share

Only modules here use click.
"""
