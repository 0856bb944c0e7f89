# SPDX-License-Identifier: Apache-2.0
"""What the processes of a server share: slot table, image locks, who lives, private files."""
