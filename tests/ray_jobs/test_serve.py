"""A model behind HTTP as `tavlad serve` puts it there, on the embedded cluster, asked with real clips."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from infra.site import Site
from ray_jobs.served_model import ServedModel
from shards.store import open_store
from tests.ports import free_port
from tests.ray_jobs.test_http_app import ask

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(local_site: Site, small_model: Path) -> Generator[tuple[str, "subprocess.Popen[str]"]]:
    """The address of the small model's service, and its process."""
    port = free_port()
    command = [sys.executable, "-m", "ray_jobs.cli", "serve", str(small_model), "--port", str(port)]
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
