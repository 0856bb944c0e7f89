# SPDX-License-Identifier: Apache-2.0
"""Terminal output and pictures for the docs: see ``scripts/capture``.

__main__   arguments
scenes     what is run, against which server, and when the terminal is looked at
browser    the operators' page in Chromium
terminal   a program in a pseudo-terminal, and what its screen shows
document   blocks between markers in a Markdown file
"""
