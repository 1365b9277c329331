"""The HTTP face of a served model: `/predict`, `/health`, OpenAPI at `/openapi.json`. Knows no Ray.

What it refuses, it refuses before the model sees it: no token, a body that is too large (counted while it arrives,
whatever it claims), an object outside the site's bucket, what is no video. Every refusal is one sentence under `error`.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tavlad.errors import UserError

_BYTES_OF_FORM = 64 * 1024
"""Beside the video, in a multipart body."""
_DRAINED_BODIES = 8
"""How many times the largest body is taken, and dropped, before a refusal."""
_SECONDS_TO_DRAIN = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request may cost."""

    max_bytes: int = 64 * 1024 * 1024
    """Of a video."""
    seconds: float = 60.0
    """From the last byte of a request to its answer."""
    token_digest: str | None = None
    """SHA-256 of the token that requests must bear; None lets everybody in."""


class Ranked(BaseModel):
    """One row of an answer."""

    rank: int = Field(description="1 for the most probable action")
    action: str
    probability: float


class Prediction(BaseModel):
    """What the model says of a video."""

    video: str = Field(description="the file's name or the object's URI")
    model: str
    predictions: list[Ranked]


class Health(BaseModel):
    """The service answers, with this model."""

    status: str
    model: str
    actions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """What answers behind the face."""

    model: str
    """Name and version."""
    num_actions: int
    predict: Callable[[bytes, int], Awaitable[list[Ranked]]]
    """The top actions of a video's bytes; UserError when they are none."""
    read: Callable[[str, int], bytes]
    """An s3:// object of at most so many bytes; UserError for what cannot be read."""


def digest_of_token(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def make_app(backend: Backend, limits: Limits) -> ASGIApp:
    """The application."""
    app = FastAPI(title=f"tavlad: {backend.model}", version="1", docs_url=None, redoc_url=None)
    app.add_exception_handler(StarletteHTTPException, _refuse)  # also what FastAPI and the form's parser refuse
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(Exception, _fail)

    @app.get("/health")
    async def health() -> Health:  # pyright: ignore[reportUnusedFunction]
        """Whether the model is loaded."""
        return Health(status="ok", model=backend.model, actions=backend.num_actions)

    @app.post("/predict", responses={code: {"description": why} for code, why in _REFUSALS.items()})
    async def predict(  # pyright: ignore[reportUnusedFunction]
        video: Annotated[UploadFile | None, Form(description="a video file")] = None,
        uri: Annotated[str | None, Form(description="or an s3:// URI in the site's bucket")] = None,
        top: Annotated[int, Form(ge=1, description="actions to name")] = 5,
    ) -> Prediction:
        """Name the action in a video: a file of a multipart form, or an object of the site's bucket."""
        if (video is None) == (uri is None):
            raise HTTPException(400, "send one of the two: the file `video`, or the `uri` of an object")
        name = uri or (video.filename if video is not None else None) or "video"
        try:
            async with asyncio.timeout(limits.seconds):
                if video is not None:
                    data = await video.read()
                else:
                    data = await asyncio.to_thread(backend.read, name, limits.max_bytes)
                predictions = await backend.predict(data, top)
        except TimeoutError:
            raise HTTPException(504, f"no answer within {limits.seconds:g} s: send a shorter video") from None
        except UserError as error:
            raise HTTPException(400, str(error)) from None
        return Prediction(video=name, model=backend.model, predictions=predictions)

    return _Guard(app, limits)


_REFUSALS = {
    400: "not one video that can be decoded",
    401: "no token, or a wrong one",
    413: "too large",
    422: "not such a form",
    500: "the service failed",
    504: "it took too long",
}


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, StarletteHTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)


async def _fail(_: Request, error: Exception) -> JSONResponse:
    """Of whatever nobody who sends a video can mend; it is raised again after the answer, and logged."""
    return JSONResponse({"error": f"the service failed ({type(error).__name__}): its log has the traceback"}, 500)


class _Guard:
    """Tokens and sizes, before anything is kept of a body."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if scope["path"] != "/health" and not self._is_known(headers.get(b"authorization", b"")):
            answer = JSONResponse({"error": "send the header Authorization: Bearer TOKEN"}, 401)
            await answer(scope, receive, send)
            return
        most = self._limits.max_bytes + _BYTES_OF_FORM
        too_large = f"the video is larger than {self._limits.max_bytes} bytes"
        claimed = headers.get(b"content-length", b"0")
        if claimed.isdigit() and int(claimed) > most:
            await _drain(receive, most)
            await JSONResponse({"error": too_large}, 413)(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > most:
                if message.get("more_body", False):
                    await _drain(receive, most)
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, counted, send)

    def _is_known(self, header: bytes) -> bool:
        if self._limits.token_digest is None:
            return True
        kind, _, token = header.decode("latin-1").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(digest_of_token(token), self._limits.token_digest)


async def _drain(receive: Receive, most: int) -> None:
    """Take the rest of a body, so far as it is not endless: many clients read no answer while they still send."""
    num_bytes = 0
    try:
        async with asyncio.timeout(_SECONDS_TO_DRAIN):
            while num_bytes < _DRAINED_BODIES * most:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
