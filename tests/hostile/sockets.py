"""Bytes that no client of ours sends, at raw ports: broken HTTP/2 at gRPC's, bad HTTP at control's.

Each function opens a connection of its own, sends, looks for an answer for a moment, and closes.
"""

import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from random import Random

from lesft.channel import split_address

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4

_SECONDS = 2.0
_ANSWER_SECONDS = 0.02


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    """One header field without indexing, without Huffman (RFC 7541, section 6.2.2)."""
    parts = b""
    for text in (name, value):
        data = text.encode()
        head = bytes([len(data)]) if len(data) < 127 else _long_length(len(data))
        parts += head + data
    return b"\x00" + parts


def _long_length(length: int) -> bytes:
    out, rest = b"\x7f", length - 127
    while rest > 0x7F:
        out += bytes([rest & 0x7F | 0x80])
        rest >>= 7
    return out + bytes([rest])


def grpc_headers(path: str) -> bytes:
    """The header block of a gRPC call."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(literal(name, value) for name, value in fields.items())


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    """A connection; that the other end breaks it is not an error."""
    connection = socket.create_connection(split_address(address), timeout=_SECONDS)
    with connection, suppress(ConnectionError, TimeoutError):
        yield connection


def send_raw(address: str, data: bytes) -> bytes:
    """Send bytes, whole or as far as they are taken; what comes back in a moment."""
    with connected(address) as connection:
        connection.sendall(data)
        connection.settimeout(_ANSWER_SECONDS)
        return connection.recv(4096)
    return b""


# ---------------------------------------------------------------------- at a gRPC port


def _opened() -> bytes:
    return PREFACE + frame(SETTINGS, 0, 0)


def _garbage(random: Random, path: str) -> bytes:
    return random.randbytes(random.choice((1, 9, 24, 100, 5000)))


def _http1(random: Random, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * random.choice((1, 20))


def _tls_hello(random: Random, path: str) -> bytes:
    return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(500)


def _half_frame(random: Random, path: str) -> bytes:
    whole = _opened() + frame(HEADERS, END_HEADERS, 1, grpc_headers(path))
    return whole[: random.randrange(len(whole))]


def _lying_length(random: Random, path: str) -> bytes:
    size = random.choice((2**24 - 1, 16385, 1))
    return _opened() + struct.pack(">I", size)[1:] + b"\x01\x04\x00\x00\x00\x01" + b"\x00" * 100


def _settings_flood(random: Random, path: str) -> bytes:
    setting = struct.pack(">HI", random.randrange(9), random.choice((0, 1, 2**31 - 1, 2**32 - 1)))
    return _opened() + frame(SETTINGS, 0, 0, setting * random.choice((1, 50))) * 2_000


def _ping_flood(random: Random, path: str) -> bytes:
    return _opened() + frame(PING, 0, 0, bytes(8)) * 3_000


def _rapid_reset(random: Random, path: str) -> bytes:
    headers = grpc_headers(path)
    return _opened() + b"".join(
        frame(HEADERS, END_HEADERS, stream, headers)
        + frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
        for stream in range(1, 400, 2)
    )


def _continuation_flood(random: Random, path: str) -> bytes:
    more = frame(CONTINUATION, 0, 1, literal("x", "y" * 100) * 30)
    return _opened() + frame(HEADERS, 0, 1, grpc_headers(path)) + more * 300


def _huge_headers(random: Random, path: str) -> bytes:
    block = grpc_headers(path) + literal("x", "y" * 15_000)
    return _opened() + frame(HEADERS, END_HEADERS, 1, block)


def _header_bomb(random: Random, path: str) -> bytes:
    """One entry of the dynamic table, and thousands of references of one byte to it."""
    entry = b"\x40" + literal("x", "y" * 3_000)[1:]
    block = grpc_headers(path) + entry + b"\xbe" * 12_000
    return _opened() + frame(HEADERS, END_HEADERS, 1, block)


def _broken_headers(random: Random, path: str) -> bytes:
    return _opened() + frame(HEADERS, END_HEADERS, 1, random.randbytes(200))


def _odd_frames(random: Random, path: str) -> bytes:
    """Frames of any kind, on any stream, of any length."""
    return _opened() + b"".join(
        frame(
            random.randrange(12),
            random.randrange(256),
            random.choice((0, 1, 2, 3, 2**31 - 1, 2**32 - 1)),
            random.randbytes(random.choice((0, 4, 5, 6, 8, 300))),
        )
        for _ in range(random.choice((1, 10, 100)))
    )


def _window_overflow(random: Random, path: str) -> bytes:
    update = frame(WINDOW, 0, random.choice((0, 1)), struct.pack(">I", 2**31 - 1))
    return _opened() + frame(HEADERS, END_HEADERS, 1, grpc_headers(path)) + update * 3


def _broken_message(random: Random, path: str) -> bytes:
    """A call whose message has a lying length, or says it is compressed and is not."""
    flag, size = random.choice((0, 1, 2, 255)), random.choice((0, 5, 100, 2**21 + 1, 2**32 - 1))
    message = struct.pack(">BI", flag, size) + random.randbytes(50)
    flags = random.choice((0, END_STREAM))
    headers = frame(HEADERS, END_HEADERS, 1, grpc_headers(path))
    return _opened() + headers + frame(DATA, flags, 1, message)


HTTP2_ATTACKS: Sequence[Callable[[Random, str], bytes]] = (
    *(_garbage, _http1, _tls_hello, _half_frame, _lying_length, _settings_flood, _ping_flood),
    *(_rapid_reset, _continuation_flood, _huge_headers, _header_bomb, _broken_headers),
    *(_odd_frames, _window_overflow, _broken_message),
)


def attack_grpc_port(random: Random, address: str, path: str) -> None:
    """One connection that breaks the rules of HTTP/2 in one of many ways; `path` is a method's."""
    attack = random.choice(HTTP2_ATTACKS)
    with connected(address) as connection:
        connection.sendall(attack(random, path))
        connection.settimeout(_ANSWER_SECONDS)
        connection.recv(4096)


# ---------------------------------------------------------------------- at an HTTP port

_ODD_PATHS = (
    *("/", "/v1", "/v1/rounds?first=-1", "/v1/rounds?first=" + "9" * 5000, "/%00", "/%ff%fe"),
    *("/../../etc/passwd", "/v1/clients/%2e%2e", "/v1/adapters/0", "/v1/adapters/" + "9" * 100),
    *("/v1/adapters/1/file/../..", "/" + "x" * 20_000, "*", "http://other/v1/run", "/v1/run#\r"),
    *("/v1/events?last=nan", "/metrics?name[]=" + "a" * 500, "/openapi.json", "/healthz"),
    *("/v1/chat/completions", "/v1/completions", "/v1/models/" + "é" * 50),
)
_ODD_HEADERS = (
    *("Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 5"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Host: \x00", "Host:"),
    *("Upgrade: h2c", "Expect: 100-continue", "Range: bytes=0-1,5-2,9999999999-", "A" * 5_000),
    *("Authorization: Bearer " + "x" * 4_000, "Cookie: " + "a=b; " * 900, ": empty", "X: \xff"),
    *("Content-Encoding: gzip", "Content-Type: application/json", "Last-Event-ID: -1"),
)
_ODD_BODIES = (
    *(
        b"",
        b"{",
        b"[" * 50_000,
        b'{"model": 1e999}',
        b"\xff\xfe",
        b"ffffffffffffffff\r\nx",
        b"5\r\nx",
    ),
    *(b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"n": ' + b"9" * 5000 + b"}"),
    *(b'{"model": "m", "messages": []}', b"null", b'{"prompt": ["a", 1, null]}'),
)
_METHODS = ("GET", "HEAD", "PUT", "OPTIONS", "TRACE", "CONNECT", "PRI", "get", "G\x00T", "x" * 300)


def bad_http(random: Random) -> bytes:
    """A request that breaks rules of HTTP or of the API; none that an operator might give."""
    if random.random() < 0.1:
        return random.randbytes(random.choice((1, 50, 70_000)))
    path = random.choice(_ODD_PATHS)
    # What might be an order goes to paths that give none.
    method = random.choice((*_METHODS, "POST")) if "v1/c" in path else random.choice(_METHODS)
    version = random.choice(("HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/9.9", "", "HTTP/2"))
    lines = [f"{method} {path} {version}", "Host: localhost", "Connection: close"]
    lines += [random.choice(_ODD_HEADERS) for _ in range(random.choice((0, 1, 3)))]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
    if random.random() < 0.1:
        return head[: random.randrange(len(head))]
    return head + random.choice(_ODD_BODIES)


def attack_http_port(random: Random, address: str) -> int | None:
    """One bad request; the status of the answer, None where there is none."""
    answer = send_raw(address, bad_http(random))
    parts = answer.split(b" ", 2)
    if not answer.startswith(b"HTTP/1.") or len(parts) < 2 or not parts[1].isdigit():
        return None
    return int(parts[1])
