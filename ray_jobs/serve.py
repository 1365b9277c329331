"""tavlad serve: a registered model behind HTTP, by Ray Serve: requests in batches, replicas over the cluster."""

import asyncio
import ipaddress
import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from starlette.types import ASGIApp

from infra.site import Site, load_site
from ray_jobs.clips import Decoders
from ray_jobs.cluster import connect, require_room
from ray_jobs.console import Console
from ray_jobs.http_app import Backend, Limits, Ranked, digest_of_token, make_app
from ray_jobs.models import fetch_model, pin_model
from shards.scratch import scratch
from shards.store import open_store
from tavlad.errors import UserError
from tavlad.predict import Predictor

_APP = "tavlad"
_MAX_BATCH = 8
_SECONDS_TO_FILL_A_BATCH = 0.01
_REQUESTS_AT_ONCE = 32
"""Of one replica; as many wait, more are refused with status 503."""
_SECONDS_OF_GRACE = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """Where a model answers, and at what cost."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    max_megabytes: int = 64
    seconds: float = 60.0
    token: str | None = None

    def __post_init__(self) -> None:
        if not _is_loopback(self.host) and not self.token:
            raise UserError(
                f"{self.host} can be reached from other machines: give --token-file FILE, or serve on 127.0.0.1"
            )
        for name in ("replicas", "max_megabytes", "seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0")


def serve_model(site: Site, model: str, options: ServeOptions, console: Console) -> None:
    """Serve until this process is interrupted or terminated: the version that `model` means now, on all replicas.

    ValueError when the cluster serves something already.
    """
    connect(site, console.say)
    require_room(site, {"CPU": options.replicas}, {"CPU": "--replicas"})
    if serve.status().proxies:
        raise UserError("this cluster serves something already, on the one address it has: end that first")
    limits = Limits(
        max_bytes=options.max_megabytes * 1_000_000,
        seconds=options.seconds,
        token_digest=None if options.token is None else digest_of_token(options.token),
    )
    http = HTTPOptions(host=options.host, port=options.port, request_timeout_s=options.seconds + _SECONDS_OF_GRACE)
    pinned = pin_model(site.mlflow_uri, model)  # an alias may move while replicas come and go
    console.heading(f"Serving {pinned}")
    try:
        serve.start(ProxyLocation.HeadOnly, http)
        replica = _deployment(options.replicas).bind(site.name, pinned, limits)
        serve.run(replica, name=_APP, route_prefix="/")
        address = f"http://{options.host}:{options.port}"
        console.say(f"  {address}/predict takes a video; {address}/openapi.json says how; Ctrl-C ends it")
        console.result({"address": address, "model": pinned})
        signal.signal(signal.SIGTERM, _interrupt)
        while True:
            time.sleep(1)
    finally:
        serve.shutdown()


class Replica:
    """One copy of the model: decodes in threads, computes in batches."""

    def __init__(self, site_name: str, model: str, limits: Limits) -> None:
        self._site = load_site(site_name)
        with scratch() as folder:
            self._predictor = Predictor(fetch_model(self._site.mlflow_uri, model, folder / "model"))
        self._decoders = Decoders(self._predictor.card, _MAX_BATCH)
        self._model = model
        self._limits = limits

    def __serve_build_asgi_app__(self) -> ASGIApp:
        backend = Backend(
            model=self._model, num_actions=len(self._predictor.card.actions), predict=self._predict, read=self._read
        )
        return make_app(backend, self._limits)

    async def _predict(self, video: bytes, top: int) -> list[Ranked]:
        frames_TCHW = await self._decoders.clip_of(video)
        probabilities_A: NDArray[np.float32] = await self._compute(frames_TCHW)
        rows = self._predictor.table(probabilities_A[None], ["video"], top)
        return [Ranked(rank=row.rank, action=row.action, probability=row.probability) for row in rows]

    @serve.batch(max_batch_size=_MAX_BATCH, batch_wait_timeout_s=_SECONDS_TO_FILL_A_BATCH)
    async def _compute(self, clips: list[Any]) -> list[Any]:
        import torch

        return list(await asyncio.to_thread(self._predictor.predict_frames, torch.stack(clips)))

    def _read(self, uri: str, max_bytes: int) -> bytes:
        prefix = f"s3://{self._site.bucket}/"
        if not uri.startswith(prefix):
            raise UserError(f"{uri!r} is not in this site's bucket: URIs begin with {prefix}")
        store = open_store(prefix, self._site.s3)
        path = uri.removeprefix(prefix)
        size = store.size(path)
        if size > max_bytes:
            raise UserError(f"{uri} has {size} bytes: at most {max_bytes} are taken")
        return store.read(path)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _deployment(num_replicas: int) -> Any:  # Ray Serve's decorators hide the class's type
    return serve.deployment(
        serve.ingress()(Replica),
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=_REQUESTS_AT_ONCE,
        max_queued_requests=_REQUESTS_AT_ONCE,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
