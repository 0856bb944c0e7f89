# SPDX-License-Identifier: Apache-2.0
"""Which ids count: config files, registrations, their use and expiry; control actions."""
