# SPDX-License-Identifier: Apache-2.0
"""Metrics over all processes: declared, counted in files, and shown with what runs now."""
