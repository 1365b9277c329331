"""The main job on real clips and real servers, as a user runs it: every verb a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.site import Site
from shards.store import Store, open_store
from tests.fixtures_verbs import ACTIONS, SHORT, TRAIN, Trained, final_weights, names_of_runs, runs_of, tavlad

pytestmark = pytest.mark.slow


def test_real_clips_end_as_a_registered_model_that_predicts_without_our_code_installed(
    local_site: Site, packed_clips: dict[str, Any], trained: Trained, real_videos: Path, tmp_path: Path
) -> None:
    assert packed_clips["clips"] == 27
    assert packed_clips["rejected"] == []
    document = trained.document
    assert (document["name"], document["alias"], document["split"]) == ("tavlad-real-split1", "best", 1)
    assert tavlad("--json", *TRAIN).document == document, "a training that is done is found, not repeated"

    scored = tavlad("--json", "evaluate", "tavlad-real-split1@best", "--dataset", "real").document
    assert scored["test/top1"] == pytest.approx(document["test_top1"])

    alone = tavlad("evaluate", "tavlad-real-split1@best", "--dataset", "real", "--fuse", "nothing")
    assert (alone.code, "--fuse nothing: write it as MODEL=SET" in alone.err) == (2, True)

    video = str(real_videos / "videos" / "bend" / "daria_bend.avi")
    program = f"""
import json, sys
import mlflow, numpy as np
assert not {{"tavlad", "shards", "ray_jobs"}} & set(sys.modules)
model = mlflow.pyfunc.load_model("models:/tavlad-real-split1@best")
by_path = model.predict([{video!r}], params={{"top": 3}})
by_frames = model.predict(np.zeros((2, 8, 3, 64, 64), dtype=np.uint8), params={{"top": 1}})
print(json.dumps([by_path.to_dict("records"), by_frames.to_dict("records")]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_TRACKING_URI": local_site.mlflow_uri},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    by_path, by_frames = json.loads(done.stdout.splitlines()[-1])
    assert {row["action"] for row in by_path} == set(ACTIONS)
    assert [row["video"] for row in by_frames] == ["0", "1"]
    said = tavlad("--json", "predict", "tavlad-real-split1@best", video, "--top", "3").document["predictions"]
    assert [(row["action"], pytest.approx(row["probability"], abs=1e-6)) for row in said] == [
        (row["action"], row["probability"]) for row in by_path
    ]


@pytest.mark.long
def test_plain_ray_job_trains_and_registers_as_the_command_does(local_site: Site, packed_clips: dict[str, Any]) -> None:
    root = Path(__file__).parents[2]
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", local_site.ray_dashboard]
    verb = ["python", "-m", "ray_jobs.train", "demo", "--dataset", "real", "--split", "2", *SHORT]
    done = subprocess.run(
        [*submit, "--working-dir", str(root), "--", *verb],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | local_site.ray_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered tavlad-real-split2 version 1 (now best)" in done.stdout


@pytest.mark.long
def test_reproduction_runs_what_is_missing_and_a_second_one_does_no_work(
    local_site: Site, packed_clips: dict[str, Any], tmp_path: Path
) -> None:
    command = [
        *("--json", "reproduce", "real", "--rows", "consensus", "--rows", "actionvlad"),
        *("--subset", "0.5", "--epochs-scale", "0.02", "--set", "model.trunk=efficientnet_lite0"),
        *("--set", "training.crop=64", "--set", "training.batch_size=8", "--set", "model.num_clusters=4"),
        *("--to", str(tmp_path)),
    ]
    first = tavlad(*command).document
    assert [(row["recipe"], row["epochs"], row["failure"]) for row in first["trainings"]] == [
        ("actionvlad", 2, None),
        ("consensus", 2, None),
    ]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    runs = names_of_runs(local_site)
    again = tavlad(*command)
    assert again.document == first
    assert again.err.count("done already") == 2
    assert names_of_runs(local_site) == runs


@pytest.mark.chaos
def test_training_killed_and_started_again_ends_with_the_weights_of_an_undisturbed_one(
    local_site: Site, trained: Trained
) -> None:
    command, run = [*TRAIN, "--no-register"], trained.run
    for path in runs_of(local_site).list(f"{run}/"):
        runs_of(local_site).delete(f"{path}")

    driver = subprocess.Popen([sys.executable, "-m", "ray_jobs.cli", *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while f"{run}/checkpoints/stage1-epoch00001/complete.json" not in runs_of(local_site).list(f"{run}/"):
        assert time.monotonic() < deadline, "no checkpoint came"
        assert driver.poll() is None, "the training ended before it could be killed"
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    final = f"{run}/checkpoints/stage2-epoch00001/complete.json"
    assert final not in runs_of(local_site).list(f"{run}/"), "killed too late to prove anything"

    resumed = tavlad(*command)
    assert resumed.code == 0, resumed.err
    assert "going on from checkpoint stage" in resumed.out
    weights = final_weights(local_site, run)
    assert weights.keys() == trained.weights.keys()
    assert all(np.array_equal(weights[name], trained.weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "demo", "--dataset", "absent"],
            "there is no set at s3://tavlad/datasets/absent: the nearest there: .*real",
        ),
        (["train", "demo", "--dataset", "real", "--set", "stage1.epoch=3"], "unknown key stage1.epoch: did you mean"),
        (
            ["train", "demo", "--dataset", "real", "--set", "model.num_clusters=9999"],
            "cannot make 9999 clusters: lower",
        ),
        (["train", "demo", "--dataset", "real", "--set", "model.weights=none.pth"], "none.pth"),
        *(
            (
                [verb, "demo", "--dataset", "real", "--set", "resources.gpus_per_worker=1", *more],
                "1 GPU asked for, .* 0 GPU",
            )
            for verb, *more in (["codebook"], ["features"], ["train"], ["tune", "--trials", "2"])
        ),
        (
            ["train", "demo", "--dataset", "real", "--set", "resources.workers=99-100"],
            "99 CPU asked for, .*: lower resources.cpus_per_worker or resources.workers, or choose a --site",
        ),
        (["predict", "tavlad-absent-split1@best", "video.avi"], "tavlad-absent-split1"),
        (["evaluate", "no-such-model", "--dataset", "real"], "no-such-model"),
        (["pack", "no-such-folder", "--name", "x"], "no-such-folder is no folder"),
    ],
)
def test_mistake_ends_as_one_sentence_and_exit_code_2(
    packed_clips: dict[str, Any], arguments: list[str], message: str
) -> None:
    said = tavlad(*arguments)
    assert said.code == 2, said.out + said.err
    assert "Traceback" not in said.out + said.err
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


def test_sweep_with_more_words_than_descriptors_is_refused_before_any_trial(
    local_site: Site, packed_clips: dict[str, Any]
) -> None:
    sweeps = open_store(local_site.sweeps_uri, local_site.s3)
    before = sweeps.list()
    few = ["--set", "codebook.frames=1", "--set", "training.crop=64"]
    said = tavlad("tune", "demo", "--dataset", "real", "--trials", "2", *few)
    assert (said.code, "descriptors that" in said.err) == (2, True), said.err
    assert sweeps.list() == before


def test_wrong_s3_key_is_refused_without_telling_the_secret(
    local_site: Site, real_videos: Path, tmp_path: Path
) -> None:
    site = tmp_path / "wrong.toml"
    site.write_text(
        f'ray_address = "{local_site.ray_address}"\nray_dashboard = "{local_site.ray_dashboard}"\n'
        f's3_endpoint = "{local_site.s3.endpoint_url}"\nbucket = "{local_site.bucket}"\n'
        f'mlflow = "{local_site.mlflow_uri}"\n'
    )
    said = tavlad(
        *("--site", str(site), "--here", "pack", str(real_videos / "videos"), "--name", "x"),
        TAVLAD_S3_ACCESS_KEY="wrong",
        TAVLAD_S3_SECRET_KEY="a-secret-that-is-wrong",
    )
    assert said.code == 2
    assert str(local_site.s3.endpoint_url) in said.err
    assert "a-secret-that-is-wrong" not in said.out + said.err
    assert "Traceback" not in said.err


def test_corrupt_and_missing_videos_are_rejected_rows_and_the_exit_code_says_so(
    local_site: Site, real_videos: Path, tmp_path: Path
) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(real_videos / "videos", videos)
    (videos / "bend" / "torn.avi").write_bytes((videos / "bend" / "daria_bend.avi").read_bytes()[:20_000])
    command = ["--json", "pack", str(videos), "--name", "torn", "--num-frames", "4", "--short-side", "64"]
    said = tavlad(*command)
    assert said.code == 2
    assert "1 videos were rejected" in said.err
    (row,) = json.loads(said.out.splitlines()[-1])["rejected"]
    assert row["path"] == "bend/torn.avi"
    assert "truncated" in row["reason"]
    assert tavlad(*command, "--max-rejected", "1").code == 0


@pytest.mark.chaos
def test_flipped_byte_stops_the_training_with_the_clips_name(local_site: Site, packed_clips: dict[str, Any]) -> None:
    store = open_store(local_site.dataset_uri("real"), local_site.s3)
    # A node that has read the clips before would not notice: it has them on its disk.
    recipe = ["demo", "--dataset", "real", *SHORT, "--set", "training.seed=3", "--set", "resources.disk_cache=0"]
    assert tavlad("codebook", *recipe).code == 0  # so that it is the training's workers who read the damage
    shards = {path: store.read(path) for path in store.list("shards/")}
    try:
        for path, content in shards.items():
            middle = len(content) // 2
            store.write(path, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        said = tavlad("train", *recipe, "--no-register")
    finally:
        for path, content in shards.items():
            store.write(path, content)
    assert said.code == 2, said.out + said.err
    assert "Traceback" not in said.out + said.err
    assert re.search(r"error: clip \S+ in s3://tavlad/datasets/real/shards/\d+\.tar is not what was packed", said.err)


@pytest.mark.chaos
def test_set_whose_packing_was_killed_is_not_used_and_can_be_finished(local_site: Site, real_videos: Path) -> None:
    command = ["pack", str(real_videos / "videos"), "--name", "killed", "--num-frames", "8", "--short-side", "96"]
    store = open_store(local_site.dataset_uri("killed"), local_site.s3)
    driver = subprocess.Popen([sys.executable, "-m", "ray_jobs.cli", *command], stdout=subprocess.DEVNULL)
    while not any(path.startswith("parts/") for path in store.list()):
        assert driver.poll() is None, "packing ended before it could be killed"
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert not store.exists("index.parquet"), "killed too late to prove anything"
    assert tavlad("train", "demo", "--dataset", "killed").code == 2
    assert tavlad(*command).code == 0
    assert store.exists("index.parquet")


_FEATURES = [*("features", "demo", "--dataset", "real", "--views", "3"), *SHORT, "--set", "training.num_views=3"]


def _objects(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in store.list()}


@pytest.mark.long
def test_training_learns_from_the_features_that_were_filled(local_site: Site, packed_clips: dict[str, Any]) -> None:
    filled = tavlad("--json", *_FEATURES).document
    assert filled["num_entries"] == 3 * 18 + 9
    assert not filled["was_there"]
    train = [*TRAIN, "--no-register", "--set", "training.num_views=3", "--set", "stage1.features=always"]
    done = tavlad("--json", *train)
    assert done.document == {"registered": False}
    # Nothing is computed that is there already: trainings write what they compute.
    store = open_store(filled["uri"], local_site.s3)
    assert "stage 1 learns from features (0.00 GB): what is frozen takes about 0 s" in done.out + done.err
    assert not store.list("through/")
    assert tavlad("--json", *_FEATURES).document == filled | {"was_there": True}


@pytest.mark.long
def test_stage_2_learns_from_the_maps_below_its_last_block(local_site: Site, packed_clips: dict[str, Any]) -> None:
    trunk = ["--set", "model.trunk=resnet18", "--set", "model.weights=none"]
    filled = tavlad("--json", *_FEATURES, "--stage", "2", *trunk).document
    assert filled["num_bytes"] == filled["num_entries"] * 8 * 256 * 4 * 4 * 2
    train = [*TRAIN, *trunk, "--no-register", "--set", "training.num_views=3", "--set", "stage2.features=always"]
    said = tavlad("--json", *train, "--set", "features.budget_gigabytes=0")
    assert said.code == 0, "all of it is there already"
    assert "stage 2 learns from features (0.00 GB): what is frozen takes about 0 s" in said.out + said.err
    assert not open_store(filled["uri"], local_site.s3).list("through/")
    refused = tavlad(*train, "--set", "training.num_views=4", "--set", "features.budget_gigabytes=0")
    assert refused.code == 2
    assert "features of 4 views a clip would take 0.00 GB, features.budget_gigabytes is 0" in refused.err
    assert "stage 1 steps" not in refused.out + refused.err, "refused before anything long begins"


@pytest.mark.chaos
def test_filling_killed_twice_ends_as_one_that_was_not(local_site: Site, packed_clips: dict[str, Any]) -> None:
    command = [*_FEATURES, "--set", "training.seed=5", "--set", "model.weights=none"]
    uri = tavlad("--json", *command).document["uri"]
    store = open_store(uri, local_site.s3)
    whole = _objects(store)
    for path in whole:
        store.delete(path)
    for shards in (1, 5):
        process = subprocess.Popen([sys.executable, "-m", "ray_jobs.cli", *command], stdout=subprocess.DEVNULL)
        while len(store.list("parts/")) < shards:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert not store.list("split")
    assert not tavlad("--json", *command).document["was_there"]
    assert _objects(store) == whole


@pytest.mark.long
def test_stream_of_motion_is_trained_fused_and_reproduced_like_that_of_frames(
    local_site: Site, packed_clips: dict[str, Any], trained: Trained, real_videos: Path, tmp_path: Path
) -> None:
    packed = tavlad(
        *("--json", "pack", str(real_videos / "videos"), "--name", "real-flow", "--layout", "hmdb51"),
        *("--splits", str(real_videos / "splits"), "--num-frames", "8", "--short-side", "96", "--modality", "flow"),
    ).document
    assert packed["clips"] == packed_clips["clips"]
    train = ["train", "demo", "--dataset", "real-flow", *SHORT]
    refused = tavlad(*train)
    assert refused.code == 2
    assert "is a set of flow and model.modality is 'rgb': add --set model.modality=flow" in refused.err
    document = tavlad("--json", *train, "--set", "model.modality=flow").document
    assert document["variant"].endswith("-flow")
    rgb, flow = "tavlad-real-split1@best", "tavlad-real-flow-split1@best"
    alone = tavlad("--json", "evaluate", flow, "--dataset", "real-flow").document
    assert alone["test/top1"] == pytest.approx(document["test_top1"])
    mixed_up = tavlad("evaluate", flow, "--dataset", "real")
    assert (mixed_up.code, "(flow)" in mixed_up.err) == (2, True)
    fused = tavlad("--json", "evaluate", rgb, "--dataset", "real", "--fuse", f"{flow}=real-flow").document
    assert (fused["clips"], len(fused["confusion"])) == (alone["clips"], len(ACTIONS))
    said = tavlad("--json", "predict", flow, str(real_videos / "videos" / "bend" / "daria_bend.avi"), "--top", "3")
    assert {row["action"] for row in said.document["predictions"]} == set(ACTIONS)
