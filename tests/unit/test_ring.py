# SPDX-License-Identifier: Apache-2.0
"""The ring of buffers between two threads."""

from concurrent.futures import ThreadPoolExecutor

from imageserver.backends.ring import Ring


def test_a_closed_ring_makes_nobody_wait_however_often_one_asks():
    with Ring(1, 4096) as ring, ThreadPoolExecutor(1) as pool:
        assert ring.take(4096, wait=True) is not None
        ring.close()
        asked = pool.submit(lambda: [ring.take(4096, wait=wait) for wait in (False, True, True)])
        try:
            assert asked.result(timeout=5) == [None, None, None]
        finally:
            ring.give(bytearray(4096))  # or a failing test would never end
            ring.give(bytearray(4096))
