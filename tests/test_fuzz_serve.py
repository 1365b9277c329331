"""Malformed requests to `tavlad serve`, by the hundred, over a real socket: each is answered or let go at once, never
by a server error, and the next one is answered as ever. `make fuzz` tries 2,000."""

import asyncio
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass, field

import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_jobs.http_app import Backend, Limits, Ranked, make_app
from shards.video import decode_clip

pytest.importorskip("python_multipart", reason="needs the extra serve")

CASES = int(os.environ.get("TAVLAD_FUZZ_CASES", "50"))
_BOUNDARY = b"xyz"
_SECONDS = 20.0


async def predict(video: bytes, top: int) -> list[Ranked]:
    """Decodes as the service does, without a model behind."""
    clip = await asyncio.to_thread(decode_clip, video, 2, 32)
    return [Ranked(rank=1, action=str(clip.frames_THWC.shape), probability=1.0)][:top]


def read(uri: str, max_bytes: int) -> bytes:
    raise ValueError(f"{uri!r} does not exist")


@dataclass
class Server:
    """Where it listens, and what it has complained of."""

    address: tuple[str, int]
    complaints: list[str] = field(default_factory=list)


class _Ear(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.append(self.format(record))


@pytest.fixture(scope="module")
def server() -> Generator[Server]:
    backend = Backend(model="tavlad-x-split1@best", num_actions=3, predict=predict, read=read)
    app = make_app(backend, Limits(max_bytes=20_000, seconds=2.0))
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    made = Server(running.servers[0].sockets[0].getsockname())
    ear = _Ear(made.complaints)
    logging.getLogger("uvicorn.error").addHandler(ear)
    try:
        yield made
    finally:
        logging.getLogger("uvicorn.error").removeHandler(ear)
        running.should_exit = True
        thread.join()


def exchange(server: Server, request: bytes) -> bytes:
    """All that is answered to these bytes, until the server closes; TimeoutError if it goes on waiting."""
    with socket.create_connection(server.address, timeout=_SECONDS) as connection:
        answer = b""
        try:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        except (ConnectionResetError, BrokenPipeError):
            pass  # it may close before all is sent
        return answer


BYTES = st.binary(max_size=200)
WORDS = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=12).map(
    lambda text: text.encode("latin-1")
)
PART = st.builds(
    lambda name, file, kind, content: (
        (b'--xyz\r\nContent-Disposition: form-data; name="' + name + b'"' + file + b"\r\n" + kind + b"\r\n" + content)
        + b"\r\n"
    ),
    st.one_of(st.sampled_from([b"video", b"uri", b"top"]), WORDS),
    st.sampled_from([b"", b'; filename="a.mp4"', b'; filename="../../out"', b"; filename*=UTF-8", b'; filename="']),
    st.sampled_from(
        [b"", b"Content-Type: video/mp4\r\n", b"Content-Transfer-Encoding: base64\r\n", b"x\r\n", b": \r\n"]
    ),
    st.one_of(
        BYTES,
        st.sampled_from([b"", b"-1", b"1e9", b"s3://tavlad/../x", b"file:///etc/passwd", b"\x00\x00\x00\x18ftypmp42"]),
        st.just(b"RIFF\xff\xff\xff\x7fAVI LIST" + b"\0" * 64),
        st.just(b"v" * 30_000),
    ),
)
MULTIPART = st.tuples(st.lists(PART, max_size=4), st.sampled_from([b"--xyz--\r\n", b"", b"--xyz", b"--abc--\r\n"])).map(
    lambda parts: b"".join(parts[0]) + parts[1]
)
BODY = st.one_of(
    MULTIPART,
    BYTES,
    st.tuples(MULTIPART, st.integers(0, 400), st.integers(0, 255)).map(
        lambda drawn: drawn[0][: drawn[1]] + bytes([drawn[2]]) + drawn[0][drawn[1] + 1 :]
    ),
)
TYPES = st.one_of(
    st.sampled_from(
        [
            b"multipart/form-data; boundary=xyz",
            b"multipart/form-data; boundary=xyz; charset=utf-16",
            b"multipart/form-data; boundary=xyz; charset=none-such",
            b"multipart/form-data",
            b"multipart/form-data; boundary=",
            b"application/x-www-form-urlencoded",
            b"application/json",
            b"multipart/form-data; boundary=" + b"x" * 300,
        ]
    ),
    WORDS,
)
LENGTHS = st.sampled_from([None, None, None, b"0", b"-1", b"5", b"99999999999999999999", b"12, 13", b"x", b"\xb2"])
TARGETS = st.one_of(
    st.sampled_from([b"/predict"] * 6 + [b"/health", b"/openapi.json", b"/../x", b"*", b"/predict?top=0", b"/%ff%00"]),
    WORDS.map(lambda word: b"/" + word.replace(b" ", b"")),
)


@settings(max_examples=CASES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from([b"POST"] * 5 + [b"GET", b"PUT", b"OPTIONS", b"HEAD", b"\x00", b"PO ST"]),
    target=TARGETS,
    kind=TYPES,
    length=LENGTHS,
    is_chunked=st.booleans(),
    extra=st.lists(st.tuples(WORDS, WORDS), max_size=2),
    body=BODY,
)
def test_requests(
    server: Server,
    method: bytes,
    target: bytes,
    kind: bytes,
    length: bytes | None,
    is_chunked: bool,
    extra: list[tuple[bytes, bytes]],
    body: bytes,
) -> None:
    headers = [(b"Host", b"x"), (b"Content-Type", kind), (b"Connection", b"close"), *extra]
    if is_chunked and length is None:
        headers.append((b"Transfer-Encoding", b"chunked"))
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    else:
        headers.append((b"Content-Length", str(len(body)).encode() if length is None else length))
    head = b"%s %s HTTP/1.1\r\n" % (method, target) + b"".join(b"%s: %s\r\n" % pair for pair in headers)
    answer = exchange(server, head + b"\r\n" + body)
    assert server.complaints == []
    if answer:
        status = int(answer.split(b" ", 2)[1])
        assert status < 500, answer
        _, _, said = answer.partition(b"\r\n\r\n")
        if status >= 400 and b"application/json" in answer and said:
            assert json.loads(said)["error"].strip(), answer
        elif status >= 400 and said:
            assert said == b"Invalid HTTP request received.", answer
    assert exchange(server, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
