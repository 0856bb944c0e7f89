# SPDX-License-Identifier: Apache-2.0
"""What people see.

    map_text  map_svg  top_table   progress
    map_cells          status      progress_bar
    terminal  units

Nothing here asks a server or moves a byte.
"""
