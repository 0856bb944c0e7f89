# SPDX-License-Identifier: Apache-2.0
"""The long way of the benchmark delays, loses and queues packets, and changes nothing in them."""

import socket

import pytest
from lab.wan import HERE, THERE, Link, Relay


def packet(size: int = 1000, mark: int = 0) -> bytes:
    """Return an IPv4 packet from here to there."""
    addresses = socket.inet_aton(HERE) + socket.inet_aton(THERE)
    return b"\x45" + bytes(11) + addresses + mark.to_bytes(4, "big") + bytes(size - 24)


def arrived(relay: Relay, now: float) -> list[int]:
    return [int.from_bytes(found[20:24], "big") for found in relay.due(now)]


def test_a_packet_comes_back_later_from_where_it_was_sent_to():
    relay = Relay(Link(delay=0.01, loss=0, rate=1e9))
    relay.take(packet(100), 5.0)
    assert relay.wait(5.0) == pytest.approx(0.01)
    assert list(relay.due(5.009)) == []
    (found,) = relay.due(5.01)
    assert found[12:20] == socket.inet_aton(THERE) + socket.inet_aton(HERE)
    assert found[:12] + found[20:] == packet(100)[:12] + packet(100)[20:]
    assert relay.wait(5.01) is None


def test_packets_with_data_take_turns_at_the_rate_and_keep_their_order():
    relay = Relay(Link(delay=0.5, loss=0, rate=10_000))
    for mark in range(3):
        relay.take(packet(1000, mark), 0.0)
    relay.take(packet(100, 9), 0.0)  # an acknowledgement
    assert arrived(relay, 0.5) == [9]
    assert arrived(relay, 0.601) == [0]
    assert arrived(relay, 0.801) == [1, 2]


def test_the_queue_before_the_bottleneck_is_a_round_trip_long():
    relay = Relay(Link(delay=0.1, loss=0, rate=10_000))
    for mark in range(9):
        relay.take(packet(1000, mark), 0.0)
    assert arrived(relay, 9.0) == [0, 1, 2]


def test_the_part_that_is_lost_is_lost_the_same_each_time():
    seen = []
    for _ in range(2):
        relay = Relay(Link(delay=0, loss=0.1, rate=1e9))
        for mark in range(1000):
            relay.take(packet(100, mark), 0.0)
        seen.append(arrived(relay, 0.0))
    assert seen[0] == seen[1]
    assert 850 < len(seen[0]) < 950


def test_what_is_not_ipv4_is_dropped():
    relay = Relay(Link(delay=0, loss=0, rate=1e9))
    relay.take(b"\x60" + packet()[1:], 0.0)
    assert relay.wait(0.0) is None
