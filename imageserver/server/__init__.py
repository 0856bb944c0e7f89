# SPDX-License-Identifier: Apache-2.0
"""The process side: gunicorn's master, and the worker that gives threads only to complete heads."""
