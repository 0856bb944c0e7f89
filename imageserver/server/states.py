# SPDX-License-Identifier: Apache-2.0
"""The states of a client connection, and every legal transition between them.

    ACCEPTED --no TLS--> HEAD
    ACCEPTED --TLS--> HANDSHAKE --done--> HEAD --complete--> QUEUED --a thread is free--> WORK
    WORK --answered--> IDLE --part of a head--> HEAD
    IDLE --a complete head--> QUEUED
    WORK --answered, part of the next head is there--> HEAD
    WORK --the next request is for another pool--> QUEUED

    HEAD, IDLE, QUEUED, WORK, SENDING --the client does not take all of an answer--> SENDING
    SENDING --all is taken--> IDLE, HEAD, QUEUED

    HANDSHAKE, HEAD, IDLE, QUEUED, WORK, SENDING --that was the last answer--> LINGER
    HANDSHAKE, HEAD, IDLE, QUEUED, WORK, SENDING, LINGER --end--> CLOSED

In WORK a pool thread owns the connection and the loop does not touch it. In QUEUED it has no
owner but the thread that is about to queue it, until a pool thread takes it. In all other states
the loop owns it and reads or sends without waiting: a client that is slow with its handshake or
its head, takes no answer, or goes on sending a body that was refused costs a file descriptor
and no thread. In SENDING nothing is read: a client has at most one answer outstanding.

``Connection.move`` is the only way from one state to another. The tests take every transition
of the table, compare the thread that took it, and compare the drawing above.
"""

from enum import Enum, Flag, auto
from types import MappingProxyType


class State(Enum):
    """What the connection waits for."""

    ACCEPTED = auto()
    HANDSHAKE = auto()
    HEAD = auto()
    """The rest of a request's head."""
    IDLE = auto()
    """The next request's first byte."""
    QUEUED = auto()
    """A pool thread; the head is complete."""
    WORK = auto()
    """The thread that answers its request."""
    SENDING = auto()
    """The client, which has not taken all of an answer."""
    LINGER = auto()
    """The client's end of the connection; ours is shut down, and what arrives is discarded."""
    CLOSED = auto()


class Thread(Flag):
    """Who makes a transition."""

    LOOP = auto()
    POOL = auto()
    ANY = LOOP | POOL


class Deadline(Enum):
    """How long the new state may last; the loop knows the seconds."""

    HEAD = auto()
    """The client timeout, for handshake and head together."""
    UNCHANGED = auto()
    """As long as was left of the old state."""
    KEEPALIVE = auto()
    PROGRESS = auto()
    """The client timeout, from the last byte that the client has taken."""
    LINGER = auto()
    NONE = auto()


class IllegalTransition(Exception):
    """A defect: the connection cannot go from its state to that one."""


_Followers = dict[State, tuple[Thread, Deadline]]

#: From each state: what may follow, which thread may do it, and the new state's deadline.
TRANSITIONS: MappingProxyType[State, _Followers] = MappingProxyType(
    {
        State.ACCEPTED: {
            State.HANDSHAKE: (Thread.LOOP, Deadline.HEAD),
            State.HEAD: (Thread.LOOP, Deadline.HEAD),
        },
        State.HANDSHAKE: {
            State.HEAD: (Thread.LOOP, Deadline.UNCHANGED),
            State.LINGER: (Thread.LOOP, Deadline.LINGER),
            State.CLOSED: (Thread.LOOP, Deadline.NONE),
        },
        State.HEAD: {
            State.QUEUED: (Thread.LOOP, Deadline.NONE),
            State.SENDING: (Thread.LOOP, Deadline.PROGRESS),
            State.LINGER: (Thread.LOOP, Deadline.LINGER),
            State.CLOSED: (Thread.LOOP, Deadline.NONE),
        },
        State.IDLE: {
            State.HEAD: (Thread.LOOP, Deadline.HEAD),
            State.QUEUED: (Thread.LOOP, Deadline.NONE),
            State.SENDING: (Thread.LOOP, Deadline.PROGRESS),
            State.LINGER: (Thread.LOOP, Deadline.LINGER),
            State.CLOSED: (Thread.LOOP, Deadline.NONE),
        },
        # The thread that queued it refuses it if no pool thread can be started.
        State.QUEUED: {
            State.WORK: (Thread.POOL, Deadline.NONE),
            State.SENDING: (Thread.ANY, Deadline.PROGRESS),
            State.LINGER: (Thread.ANY, Deadline.LINGER),
            State.CLOSED: (Thread.ANY, Deadline.NONE),
        },
        State.WORK: {
            State.HEAD: (Thread.POOL, Deadline.HEAD),
            State.IDLE: (Thread.POOL, Deadline.KEEPALIVE),
            State.QUEUED: (Thread.POOL, Deadline.NONE),
            State.SENDING: (Thread.POOL, Deadline.PROGRESS),
            State.LINGER: (Thread.POOL, Deadline.LINGER),
            State.CLOSED: (Thread.POOL, Deadline.NONE),
        },
        # The next request may have come with the last one; if it is refused, SENDING follows.
        State.SENDING: {
            State.HEAD: (Thread.LOOP, Deadline.HEAD),
            State.IDLE: (Thread.LOOP, Deadline.KEEPALIVE),
            State.QUEUED: (Thread.LOOP, Deadline.NONE),
            State.SENDING: (Thread.LOOP, Deadline.PROGRESS),
            State.LINGER: (Thread.LOOP, Deadline.LINGER),
            State.CLOSED: (Thread.LOOP, Deadline.NONE),
        },
        State.LINGER: {
            State.CLOSED: (Thread.LOOP, Deadline.NONE),
        },
        State.CLOSED: {},
    }
)
