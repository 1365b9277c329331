"""Packing, verifying and repairing as a user runs them, on the embedded site; and what no damage may do to a set."""

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infra import local, process
from infra.site import Site, state_folder
from shards.datasets import scan
from shards.pack import finish, pack_shard
from shards.plan import PackOptions, plan_packing
from shards.store import Store, open_store

pytestmark = pytest.mark.slow

_ACTIONS = ("bend", "jack", "wave2")


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "ray_jobs.cli", *arguments], text=True, **options)


def tavlad(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON document (empty if there is none), and what else was said."""
    done = start("--json", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = done.communicate(timeout=300)
    assert "Traceback" not in err, err
    return done.returncode, json.loads(out.splitlines()[-1]) if out else {}, err


def content(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in store.list()}


@pytest.fixture
def videos(shared_data: Path, tmp_path: Path) -> Path:
    for action in _ACTIONS:
        shutil.copytree(shared_data / "weizmann" / "videos" / action, tmp_path / "videos" / action)
    (tmp_path / "videos" / "bend" / "torn.avi").write_bytes(b"RIFF" + bytes(60))
    return tmp_path / "videos"


@pytest.mark.chaos
def test_damage_is_told_by_shard_and_clip_and_the_command_that_verify_names_repairs_it(
    local_site: Site, videos: Path
) -> None:
    relative = os.path.relpath(videos)  # workers run in folders of their own
    command = ["pack", relative, "--name", "mended", "--num-frames", "4", "--short-side", "64"]
    code, packed, _ = tavlad(*command, "--max-rejected", "1")
    assert (code, packed["clips"]) == (0, 27)
    store = open_store(local_site.dataset_uri("mended"), local_site.s3)
    whole = content(store)
    flipped, cut, gone = [path for path in whole if path.endswith(".tar")][:3]
    middle = len(whole[flipped]) // 2
    store.write(flipped, whole[flipped][:middle] + bytes([whole[flipped][middle] ^ 1]) + whole[flipped][middle + 1 :])
    store.write(cut, whole[cut][:-5000])
    store.delete(gone)
    store.delete("rejected.parquet")

    code, found, err = tavlad("verify", local_site.dataset_uri("mended"))
    assert code == 2
    assert {problem["shard"] for problem in found["problems"]} == {flipped, cut, gone, "rejected.parquet"}
    assert [bool(p["key"]) for p in found["problems"] if p["shard"] == flipped] == [True]
    assert any(p["key"] and "truncated" in p["what"] for p in found["problems"] if p["shard"] == cut)
    assert {"shard": gone, "key": "", "what": "is missing"} in found["problems"]
    assert flipped in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    named = re.search(r"--repair: (tavlad pack VIDEOS .* --repair)", line)
    assert named, line
    assert named[1] == found["repair"]

    repair = [str(videos) if word == "VIDEOS" else word for word in shlex.split(named[1])[1:]]
    code, _, err = tavlad(*repair, "--max-rejected", "1")
    assert code == 0, err
    assert content(store) == whole
    code, found, _ = tavlad("verify", "mended")
    assert (code, found["clips"], found["problems"], found["repair"]) == (0, 27, [], None)


@pytest.mark.chaos
def test_packing_killed_at_random_moments_and_its_s3_server_too_ends_as_in_a_single_go(
    local_site: Site, shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "ut_interaction" / "videos"
    options = PackOptions(num_frames=100, shard_megabytes=5.0)
    # The set as one go makes it, in this process and on a disk.
    single = open_store(str(tmp_path / "single"))
    plan = plan_packing(scan("hunted", source, "folders"), options)
    finish(plan, [pack_shard(plan, number, single, num_threads=2) for number in range(len(plan.shards))], single)

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(options).items()]
    command = ["pack", str(source), "--name", "hunted", *flags]
    store = open_store(local_site.dataset_uri("hunted"), local_site.s3)
    moments, cuts = random.Random(time.time_ns()), []
    for _ in range(4):
        driver = start(*command, stdout=subprocess.PIPE)
        assert driver.stdout is not None
        for line in driver.stdout:
            if line.startswith("Packing"):
                break
        time.sleep(moments.uniform(0.0, 6.0))
        driver.kill()
        driver.wait()
        driver.stdout.close()
        cuts.append(len(store.list("parts/")))
        assert not store.exists("index.parquet") or content(store).keys() >= content(single).keys()

    driver = start(*command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    num_parts = cuts[-1]
    while len(store.list("parts/")) == num_parts and driver.poll() is None:
        time.sleep(0.05)
    killed_in_time = driver.poll() is None
    for member in process.members(f"{state_folder()}:s3"):
        member.kill()
    time.sleep(moments.uniform(1.0, 10.0))
    local.up(services=["s3"])
    _, err = driver.communicate(timeout=240)
    assert driver.returncode == 0, err
    assert content(store) == content(single), cuts
    assert killed_in_time or cuts[-1] == len(plan.shards), cuts

    store.write("index.parquet", b"damaged")
    code, _, err = tavlad("verify", "hunted")
    assert code == 2
    assert re.search(r"index\.parquet is not a Parquet file: repair the set with .* --repair", err), err
    code, _, err = tavlad(*command, "--repair")
    assert code == 0, err
    assert content(store) == content(single)
