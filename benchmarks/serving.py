"""Seconds of one request to `tavlad serve`, p50 and p95, alone and with others beside it; the service must run.

tavlad serve MODEL, then: python benchmarks/serving.py VIDEOS... [--address http://127.0.0.1:8000] [--requests 100]
"""

import argparse
import json
import statistics
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ray_jobs.predict import find_videos


def ask(address: str, video: Path) -> float:
    """Seconds of one request."""
    border = uuid.uuid4().hex
    head = f'--{border}\r\nContent-Disposition: form-data; name="video"; filename="{video.name}"\r\n\r\n'
    body = head.encode() + video.read_bytes() + f"\r\n--{border}--\r\n".encode()
    request = urllib.request.Request(
        f"{address}/predict", body, {"Content-Type": f"multipart/form-data; boundary={border}"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["predictions"]
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+")
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=100)
    options = parser.parse_args()
    videos = find_videos(options.videos)
    asked = [videos[number % len(videos)] for number in range(options.requests)]
    ask(options.address, videos[0])  # warms up
    for at_once in (1, 4, 16):
        started = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            seconds = list(pool.map(lambda video: ask(options.address, video), asked))
        elapsed = time.perf_counter() - started
        cuts = statistics.quantiles(seconds, n=20)
        facts = {"at_once": at_once, "p50_s": statistics.median(seconds), "p95_s": cuts[-1]}
        print(json.dumps(facts | {"requests_per_second": len(asked) / elapsed}))


if __name__ == "__main__":
    main()
