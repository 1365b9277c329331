"""Packing on a real S3 server while both are killed with -9, again and again, at moments nobody chose."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra import local, process
from infra.site import state_folder
from shards.datasets import scan
from shards.index import INDEX_PATH
from shards.pack import finish, pack_shard
from shards.plan import PackOptions, plan_packing
from shards.store import Store, open_store
from shards.verify import verify
from tests.fixtures_services import temporary_home

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

OPTIONS = PackOptions(num_frames=40, shard_megabytes=4.0)
PACKER = """
import sys
from pathlib import Path
from infra.site import load_site
from shards.datasets import scan
from shards.pack import finish, pack_shard
from shards.plan import PackOptions, plan_packing
from shards.store import open_store

plan = plan_packing(scan("set", Path(sys.argv[1]), "folders"), PackOptions(num_frames=40, shard_megabytes=4.0))
store = open_store("s3://tavlad/datasets/set", load_site().s3)
print("packing", flush=True)
finish(plan, [pack_shard(plan, number, store, num_threads=2) for number in range(len(plan.shards))], store)
print("finished", flush=True)
"""


def content(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in store.list()}


def start(videos: Path) -> subprocess.Popen[str]:
    packer = subprocess.Popen([sys.executable, "-c", PACKER, str(videos)], stdout=subprocess.PIPE, text=True)
    assert packer.stdout is not None
    assert packer.stdout.readline() == "packing\n"
    return packer


def kill_server() -> None:
    for member in process.members(f"{state_folder()}:s3"):
        member.kill()


def test_packing_and_its_server_killed_at_random_moments_end_as_in_a_single_go(
    shared_data: Path, tmp_path: Path
) -> None:
    videos = shared_data / "ut_interaction" / "videos"
    plan = plan_packing(scan("set", videos, "folders"), OPTIONS)
    single = open_store(str(tmp_path / "single"))
    began = time.monotonic()
    finish(plan, [pack_shard(plan, n, single, num_threads=2) for n in range(len(plan.shards))], single)
    whole, seconds = content(single), time.monotonic() - began
    seed = time.time_ns()
    moments = random.Random(seed)
    with temporary_home():
        store = open_store("s3://tavlad/datasets/set", local.up(services=["s3"]).s3)
        for _ in range(5):  # the job is killed, and now and then its server with it
            packer = start(videos)
            time.sleep(moments.uniform(0, seconds / 3))
            packer.kill()
            packer.communicate()
            if moments.random() < 0.5:
                kill_server()
                local.up(services=["s3"])
            if store.exists(INDEX_PATH):
                assert verify(store) == [], f"seed {seed}: what exists is whole"
        for path in [INDEX_PATH, *store.list("shards/")[::2]]:
            store.delete(path)  # so that there is something left to be disturbed
        packer = start(videos)
        for number in range(2):  # the server is killed under a job that lives
            time.sleep(moments.uniform(0, seconds / 8))
            assert packer.poll() is None or number > 0, f"seed {seed}: killed too late to prove anything"
            kill_server()
            time.sleep(moments.uniform(0, 15))
            local.up(services=["s3"])
        said, _ = packer.communicate(timeout=240)
        assert said == "finished\n", f"seed {seed}: the job did not outlast its server"
        assert content(store) == whole, f"seed {seed}"
