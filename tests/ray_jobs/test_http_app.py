"""The HTTP face over a real socket: what it answers, what it refuses, and that it says why."""

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import uvicorn

from ray_jobs.http_app import Backend, Limits, Ranked, digest_of_token, make_app
from tavlad.errors import UserError

pytest.importorskip("python_multipart", reason="needs the extra serve")


async def predict(video: bytes, top: int) -> list[Ranked]:
    """Waits as long as a video of digits says, refuses any other."""
    if video == b"broken":
        np.zeros(3).reshape(2, 2)
    if not video.isdigit():
        raise UserError(f"a video of {len(video)} bytes: holds no video stream")
    await asyncio.sleep(int(video) / 1000)
    return [Ranked(rank=rank, action="wave", probability=0.5) for rank in range(1, top + 1)]


def read(uri: str, max_bytes: int) -> bytes:
    if uri != "s3://tavlad/clip":
        raise UserError(f"{uri} does not exist")
    return b"1"


BACKEND = Backend(model="tavlad-x-split1@best", num_actions=3, predict=predict, read=read)


@contextmanager
def serving(limits: Limits) -> Generator[str]:
    """The address of an app that listens on loopback."""
    server = uvicorn.Server(uvicorn.Config(make_app(BACKEND, limits), host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address() -> Generator[str]:
    with serving(Limits(max_bytes=100_000, seconds=0.3)) as address:
        yield address


def ask(address: str, parts: dict[str, bytes], token: str | None = None, chunked: bool = False) -> tuple[int, Any]:
    """Status and document of a multipart request; `chunked` sends it without saying its size."""
    body = b"".join(
        b'--xyz\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (name.encode(), b'; filename="a.mp4"' if name == "video" else b"", value)
        for name, value in parts.items()
    )
    body += b"--xyz--\r\n"
    data: Any = iter([body[:50_000], body[50_000:]]) if chunked else body
    request = urllib.request.Request(f"{address}/predict", data, {"Content-Type": "multipart/form-data; boundary=xyz"})
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=8) as answer:  # less than the rest of a body is waited for
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_file_and_an_object_are_answered(address: str) -> None:
    code, said = ask(address, {"video": b"1", "top": b"2"})
    assert (code, said["video"], said["model"]) == (200, "a.mp4", "tavlad-x-split1@best")
    assert said["predictions"][1] == {"rank": 2, "action": "wave", "probability": 0.5}
    assert ask(address, {"uri": b"s3://tavlad/clip"})[1]["video"] == "s3://tavlad/clip"


@pytest.mark.parametrize(
    ("parts", "code", "why"),
    [
        ({"top": b"3"}, 400, "send one of the two"),
        ({"video": b"1", "uri": b"s3://tavlad/clip"}, 400, "send one of the two"),
        ({"video": b"no"}, 400, "a video of 2 bytes: holds no video stream"),
        ({"uri": b"s3://tavlad/absent"}, 400, "s3://tavlad/absent does not exist"),
        ({"video": b"1", "top": b"0"}, 422, "body.top: Input should be greater than or equal to 1"),
        ({"video": b"broken"}, 500, "the service failed (ValueError): its log has the traceback"),
        ({"video": b"5000"}, 504, "no answer within 0.3 s"),
        ({"video": b"1" * 200_000}, 413, "the video is larger than 100000 bytes"),
    ],
)
def test_what_is_refused_is_said_in_one_sentence(address: str, parts: dict[str, bytes], code: int, why: str) -> None:
    answered, said = ask(address, parts)
    assert answered == code
    assert why in said["error"]


def test_a_body_that_does_not_say_its_size_is_counted(address: str) -> None:
    assert ask(address, {"video": b"1" * 300_000}, chunked=True)[0] == 413
    assert ask(address, {"video": b"1"}, chunked=True)[0] == 200


def test_only_the_health_is_open_without_the_token() -> None:
    with serving(Limits(token_digest=digest_of_token("open sesame"))) as address:
        assert ask(address, {"video": b"1"}) == (401, {"error": "send the header Authorization: Bearer TOKEN"})
        assert ask(address, {"video": b"1"}, token="open")[0] == 401
        assert ask(address, {"video": b"1"}, token="open sesame")[0] == 200
        with urllib.request.urlopen(f"{address}/health") as answer:
            assert json.load(answer) == {"status": "ok", "model": "tavlad-x-split1@best", "actions": 3}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/openapi.json")


def test_the_interface_describes_itself(address: str) -> None:
    with urllib.request.urlopen(f"{address}/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    assert set(paths) == {"/health", "/predict"}
    assert {"400", "401", "413", "504"} <= set(paths["/predict"]["post"]["responses"])
