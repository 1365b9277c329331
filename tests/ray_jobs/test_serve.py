"""A model behind HTTP as `tavlad serve` puts it there, on the embedded cluster, asked with real clips."""

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from infra.site import Site
from ray_jobs.clips import Decoders
from ray_jobs.served_model import ServedModel, stage_code
from shards.store import open_store
from tavlad.checkpoint import load_model
from tavlad.registry import register
from tavlad.registry_queries import pinned
from tavlad.runlog import RUN_TAG
from tavlad.tracking import create_run
from tests.ports import free_port
from tests.ray_jobs.test_http_app import ask

pytestmark = pytest.mark.slow


NAME = "tavlad-served-split1"


def register_model(site: Site, directory: Path, accuracy: float, folder: Path) -> None:
    """Make a checkpoint directory a version of `NAME`."""
    training = f"served {accuracy}"
    run_id = create_run(site.mlflow_uri, "tavlad/served", training, {RUN_TAG: training}, {})
    code = stage_code(folder / training, load_model(directory)[1].model)
    register(site.mlflow_uri, directory, run_id=run_id, name=NAME, tags={}, accuracy=accuracy, code=code)


@pytest.fixture(scope="module")
def service(
    local_site: Site, small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Generator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of the small model's service, the best of its name, and its process."""
    register_model(local_site, small_model, 0.5, tmp_path_factory.mktemp("code"))
    port = free_port()
    command = [sys.executable, "-m", "ray_jobs.cli", "serve", f"{NAME}@best", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--max-megabytes", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(process.communicate()[0])
            time.sleep(0.3)
    yield address, process
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{address}/health", timeout=5)


def test_many_requests_at_once_are_answered_as_the_model_answers(
    service: tuple[str, Any], local_site: Site, small_model: Path, shared_data: Path
) -> None:
    address, _ = service
    videos = sorted((shared_data / "weizmann" / "videos").rglob("*.avi"))[::9]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda video: ask(address, {"video": video.read_bytes(), "top": b"3"}), videos))
    expected = ServedModel(small_model).predict(videos)
    for video, (code, said) in zip(videos, answers, strict=True):
        assert code == 200, said
        rows = expected[expected["video"] == str(video)]
        assert [each["action"] for each in said["predictions"]] == rows["action"].tolist()
        probabilities = [each["probability"] for each in said["predictions"]]
        assert probabilities == pytest.approx(rows["probability"].tolist(), abs=1e-5)
    store = open_store(f"s3://{local_site.bucket}/served", local_site.s3)
    store.write("clip.avi", videos[0].read_bytes())
    code, said = ask(address, {"uri": f"s3://{local_site.bucket}/served/clip.avi".encode()})
    assert code == 200
    same = answers[0][1]["predictions"]  # in a batch with others
    assert [each["action"] for each in said["predictions"]] == [each["action"] for each in same]
    assert said["predictions"][0]["probability"] == pytest.approx(same[0]["probability"], abs=1e-5)


def kill_replicas(site: Site) -> None:
    """End every copy of the model, as a lost node would; the cluster starts others."""
    code = (
        "from infra.site import activate, load_site\n"
        "site = load_site()\nactivate(site)\n"
        "import ray\nfrom ray.util import list_named_actors\nfrom ray_jobs.cluster import connect\nconnect(site)\n"
        "found = list_named_actors(all_namespaces=True)\n"
        "found = [each for each in found if each['name'].startswith('SERVE_REPLICA')]\n"
        "for each in found:\n    ray.kill(ray.get_actor(**each))\n"
        "assert found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_version_served_stays_though_the_alias_moves_and_replicas_die(
    service: tuple[str, Any], local_site: Site, small_model: Path, shared_data: Path, tmp_path: Path
) -> None:
    address, _ = service
    video = next((shared_data / "weizmann" / "videos").rglob("*.avi")).read_bytes()
    code, before = ask(address, {"video": video})
    assert (code, before["model"]) == (200, f"{NAME}/1")
    other = shutil.copytree(small_model, tmp_path / "other")
    weights = load_file(other / "weights.safetensors")
    save_file(weights | {"classifier.weight": -weights["classifier.weight"]}, other / "weights.safetensors")
    register_model(local_site, other, 0.75, tmp_path)
    assert pinned(local_site.mlflow_uri, f"{NAME}@best") == f"{NAME}/2"
    kill_replicas(local_site)
    deadline = time.monotonic() + 120
    while (after := ask_patiently(address, video)) is None:
        assert time.monotonic() < deadline
    assert after == before
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer)["model"] == f"{NAME}/1"


def ask_patiently(address: str, video: bytes) -> Any:
    """The answer to a video, or None where no replica gives one now."""
    try:
        code, said = ask(address, {"video": video})
    except (OSError, ValueError):
        time.sleep(0.5)
        return None
    return said if code == 200 else None


def endless_video() -> bytes:
    """Five megabytes of WebM that take half a minute to decode: large frames in which nothing moves."""
    size, rate = {"width": 1920, "height": 1080, "pix_fmt": "yuv420p"}, Fraction(1, 25)
    encoder = av.VideoCodecContext.create("libvpx", "w")
    frame = av.VideoFrame.from_ndarray(np.full((1080, 1920, 3), 128, np.uint8), format="rgb24").reformat(
        format="yuv420p"
    )
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = *size.values(), rate
    packets: list[bytes] = []
    for number in range(6):
        frame.pts = number
        packets += [bytes(packet) for packet in encoder.encode(frame)]
    packets += [bytes(packet) for packet in encoder.encode(None)]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=25, options={}, **size)
        for number in range(25_000):
            packet = av.Packet(packets[min(number, 5)])
            packet.pts = packet.dts = number
            packet.stream, packet.time_base, packet.is_keyframe = stream, rate, number == 0
            container.mux(packet)
    return buffer.getvalue()


def test_requests_that_timed_out_leave_the_threads_to_others(small_model: Path, shared_data: Path) -> None:
    decoders, endless = Decoders(load_model(small_model)[1], 8), endless_video()
    quick = next((shared_data / "weizmann" / "videos").rglob("*.avi")).read_bytes()

    async def time_out() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await decoders.clip_of(endless)

    async def ask_all() -> None:
        await asyncio.gather(*(time_out() for _ in range(40)))
        async with asyncio.timeout(60):
            await decoders.clip_of(quick)

    asyncio.run(ask_all())


def test_what_is_too_large_or_elsewhere_is_refused(service: tuple[str, Any], local_site: Site) -> None:
    address, _ = service
    assert ask(address, {"video": b"0" * 1_200_000})[0] == 413
    code, said = ask(address, {"uri": b"s3://other/clip.avi"})
    assert (code, said["error"]) == (
        400,
        f"'s3://other/clip.avi' is not in this site's bucket: URIs begin with s3://{local_site.bucket}/",
    )


def test_a_second_service_on_the_cluster_is_refused(service: tuple[str, Any], small_model: Path) -> None:
    command = [sys.executable, "-m", "ray_jobs.cli", "--json", "serve", str(small_model), "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "this cluster serves something already" in done.stderr
    with urllib.request.urlopen(f"{service[0]}/health") as answer:
        assert json.load(answer)["status"] == "ok"
