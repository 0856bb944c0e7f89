# SPDX-License-Identifier: Apache-2.0
"""imagectl's command line: arguments in, sentences and exit statuses out."""
