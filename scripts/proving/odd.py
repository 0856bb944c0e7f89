# SPDX-License-Identifier: Apache-2.0
"""Odd requests, from a seed: what clients, proxies and those who attack them make of HTTP/1.

Each is a list of lines with their ends, and a body, of which a few are strange. Most name a
second request behind the body, which is what whoever smuggles wants to have read.
"""

import random
from dataclasses import dataclass

#: Usual and odd forms of each part.
_Forms = tuple[list[bytes], list[bytes]]
_ENDS: _Forms = [b"\r\n"], [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b" \r\n", b"\t\r\n"]
_METHODS: _Forms = (
    [b"GET", b"PUT", b"PATCH", b"POST", b"OPTIONS", b"HEAD"],
    [b"get", b"GE T", b"G\0T", b"", b"P\xc3\x9cT", b"PUT\t", b"TRACE", b"CONNECT", b"PRI"],
)
_VERSIONS: _Forms = (
    [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"],
    [
        b"HTTP/1.2",
        b"HTTP/2.0",
        b"HTTP/0.9",
        b"http/1.1",
        b"HTTP/1.1 ",
        b"HTTP/1",
        b"HTTP/11.1",
        b"",
    ],
)
_TARGETS: _Forms = (
    [b"/images/%s", b"/images/%s?a=b", b"http://x/images/%s"],
    [
        *(b"/images/%s#c", b"/images/%s/../y", b"//images/%s", b"/images/%s%%00", b"*", b"x:80"),
        *(b"/images/%s%%0d%%0a", b"/images/%s y", b"images/%s", b"/images/%s\xff"),
        *(b"/images/%s\x7f", b"/images/%s\\"),
    ],
)
_NUMBERS: _Forms = (
    [b"%d"],
    [
        *(b"+%d", b"0%d", b" %d", b"%d ", b"\t%d\t", b"%d,%d", b"%d, %d", b"0x%d", b"%d;", b"%d.0"),
        *(
            b"-%d",
            b"\xd9\xa5",
            b"",
            b"%d\0",
            b"\x0b%d",
            b"%d\x0c",
            b"1844674407370955161%d",
            b"%d_0",
        ),
    ],
)
_CODINGS: _Forms = (
    [b"chunked", b"Chunked"],
    [
        *(b"chunked, identity", b"identity, chunked", b"identity", b"xchunked", b"chunked,"),
        *(b",chunked", b"\x0bchunked", b"chunked\x0b", b"gzip, chunked", b"chunked;q=1"),
        *(b'"chunked"', b"chunked\0", b"chunk\xc3\xa9d", b"", b"chunked, chunked", b"\tchunked"),
    ],
)
_NAMES: _Forms = (
    [b"%s: ", b"%s:"],
    [
        *(b"%s : ", b"%s\t: ", b"\x0b%s: ", b"%s\0: ", b" %s: ", b"\t%s: ", b"%s", b"%s:\r\n "),
        *(b"X: y\r\n %s: ", b"%s\r\n: ", b"%s:\t", b"%s:\x0b", b"%s:  "),
    ],
)
_OTHERS: list[bytes] = [
    *(b"Connection: close", b"Connection: keep-alive", b"Connection: content-length"),
    *(
        b"Connection: transfer-encoding",
        b"Connection: upgrade",
        b"Upgrade: websocket",
        b"Upgrade: h2c",
    ),
    *(b"Expect: 100-continue", b"Expect: 200-ok", b"TE: trailers", b"Trailer: Content-Length"),
    *(
        b"X: y\r\n folded",
        b"X: a\rb",
        b"X: a\x00b",
        b"X",
        b": y",
        b"X Y: z",
        b"X:\xff\xfe",
        b"X: \x7f",
    ),
    *(b"Host: y", b"Host:", b"Host: a b", b"Range: bytes=0-4", b"Content-Range: bytes 0-4/*"),
    *(
        b"Content_Length: 3",
        b"Transfer_Encoding: chunked",
        b"Content-Length-: 3",
        b"Content-Encoding: gzip",
    ),
    *(
        b"Proxy-Connection: close",
        b"Keep-Alive: timeout=5",
        b"Max-Forwards: 0",
        b"HTTP2-Settings: AAAA",
    ),
]
_CHUNK_SIZES: _Forms = (
    [b"%x", b"%X"],
    [b"0%x", b"%x;a=b", b"%x ;a", b" %x", b"%x ", b"0x%x", b"+%x", b'%x;a="\r\n"', b"%x\0", b""],
)
_CHUNK_ENDS: _Forms = [b"\r\n"], [b"\n", b"\r", b"", b" \r\n"]
_LASTS: _Forms = (
    [b"0\r\n\r\n"],
    [
        *(b"00\r\n\r\n", b"0;a\r\n\r\n", b"0\r\nX: y\r\n\r\n", b"0\n\n", b"0\r\n"),
        b"0\r\nContent-Length: 9\r\n\r\n",
    ],
)
_SMUGGLED = b"GET /images/smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(frozen=True)
class Odd:
    """One request's bytes, and what may follow it."""

    number: int
    data: bytes


class _Maker:
    """Makes one request; how odd it is in all its parts is its own."""

    def __init__(self, seed: str, number: int) -> None:
        self._choose = random.Random(f"{seed} {number}")
        self._share = self._choose.choice([0.0, 0.02, 0.05, 0.2])
        self._number = number

    def _one(self, forms: _Forms) -> bytes:
        return self._choose.choice(forms[self._happens(self._share)])

    def _happens(self, share: float) -> bool:
        return self._choose.random() < share

    def _length(self, length: int) -> bytes:
        form = self._one(_NUMBERS)
        return form % ((length,) * form.count(b"%d"))

    def _named(self, name: bytes, value: bytes) -> bytes:
        return (
            self._one(_NAMES) % self._choose.choice([name, name, name.lower(), name.upper()])
            + value
        )

    def _body(self) -> tuple[bytes, bool]:
        """Return a body, and whether it is one of chunks."""
        data = bytes(self._choose.choices(b"ab0\r\n", k=self._choose.choice([0, 1, 5, 5, 30])))
        if self._happens(0.6):
            return data, False
        text = b""
        for _ in range(self._choose.choice([0, 1, 1, 2])):
            form = self._one(_CHUNK_SIZES)
            size = form % ((len(data),) * (b"%x" in form or b"%X" in form))
            text += size + self._one(_CHUNK_ENDS) + data + self._one(_CHUNK_ENDS)
        return text + self._one(_LASTS), True

    def _framing(self, body: bytes, *, is_chunked: bool) -> list[bytes]:
        """Return what says how long the body is: mostly as it is."""
        lengths, codings = (0, 1) if is_chunked else (1, 0)
        if self._happens(self._share):
            lengths, codings = self._choose.choice([(1, 1), (2, 0), (0, 2), (0, 0), (2, 1)])
        fields = []
        for _ in range(lengths):
            length = len(body)
            if self._happens(self._share):
                length = self._choose.choice([0, length + 1, max(0, length - 1), 3])
            fields.append(self._named(b"Content-Length", self._length(length)))
        named = (self._named(b"Transfer-Encoding", self._one(_CODINGS)) for _ in range(codings))
        return [*fields, *named]

    def make(self) -> Odd:
        """Return the request."""
        target = self._one(_TARGETS)
        target = target % (b"%d" % self._number) if b"%s" in target else target
        first = b" ".join((self._one(_METHODS), target, self._one(_VERSIONS)))
        body, is_chunked = self._body()
        fields = [b"Host: x", *self._framing(body, is_chunked=is_chunked)]
        fields += [
            self._choose.choice(_OTHERS) for _ in range(self._choose.choice([0, 0, 0, 1, 2]))
        ]
        if self._happens(self._share):
            fields.remove(b"Host: x")
        self._choose.shuffle(fields)
        head = b"".join(line + self._one(_ENDS) for line in (first, *fields)) + self._one(_ENDS)
        before = self._one(([b""], [b"\r\n", b"\n", b" "]))
        after = _SMUGGLED if self._happens(0.7) else b""
        return Odd(self._number, before + head + body + after)


def odd_requests(seed: str, count: int) -> list[Odd]:
    """Return so many, the same for a seed each time."""
    return [_Maker(seed, number).make() for number in range(count)]
