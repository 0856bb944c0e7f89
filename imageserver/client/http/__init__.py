# SPDX-License-Identifier: Apache-2.0
"""An image behind HTTP.

    remote                         one image: abilities, size, extents, bytes
    transport                      requests and their failures
    answers                        what answers say
    connections  extent_list       urllib3 over our sockets; extents, parsed as they come
    access                         URL, certificates, Unix socket

Each request is made once, and an answer is accepted only if its head proves it right.
"""
