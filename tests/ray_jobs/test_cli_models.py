"""The verbs that use a model, as a user calls them, on real clips; a model's folder needs no services."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pyarrow.parquet as pq
import pytest
import torch

from ray_jobs.cli import main
from ray_jobs.predict import find_videos, seconds_of
from tavlad.backbone import load_weights
from tavlad.checkpoint import ModelCard, save_checkpoint
from tavlad.config import ModelConfig
from tavlad.model import TaVlad
from tests.mlflow_server import MlflowServer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained model on a real trunk."""
    torch.manual_seed(0)
    config = ModelConfig(trunk="efficientnet_lite0", weights="none", num_clusters=4, gru_width=8)
    network = TaVlad(config, 3)
    load_weights(network.trunk, config.trunk, "imagenet")
    torch.nn.init.normal_(network.vlad.weight, std=3)
    torch.nn.init.normal_(network.classifier.weight, std=3)
    card = ModelCard(
        model=config, actions=("clap", "jump", "wave"), num_frames=4, short_side=72, crop=64, precision="float32"
    )
    directory = tmp_path_factory.mktemp("model") / "model"
    save_checkpoint(directory, network, card)
    return str(directory)


@pytest.fixture
def clips(shared_data: Path, tmp_path: Path) -> Path:
    """A folder of two real clips, one of them deeper, and a text."""
    folder = tmp_path / "clips"
    (folder / "deeper").mkdir(parents=True)
    bend = shared_data / "weizmann" / "videos" / "bend"
    (folder / "a.avi").symlink_to(bend / "daria_bend.avi")
    (folder / "deeper" / "b.AVI").symlink_to(bend / "denis_bend.avi")
    (folder / "notes.txt").write_text("no video")
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """The JSON document of a verb."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--json", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) == code, err
    return json.loads(out.splitlines()[-1]) if out else {"error": err.splitlines()[-1]}


def test_folders_patterns_and_paths_name_the_same_videos(
    model: str, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(clips / "a.avi"), str(clips / "deeper" / "b.AVI")
    document = said(capsys, "predict", model, clips, "--top", "1")
    assert [row["video"] for row in document["predictions"]] == [a, b]
    for named in ([f"{clips}/**/*.[aA][vV][iI]"], [a, b], [a, clips]):
        assert [str(path) for path in find_videos([str(each) for each in named])] == [a, b]


def test_a_bad_video_is_reported_the_rest_done_and_the_exit_code_says_so(
    model: str, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (clips / "b.mp4").write_bytes((clips / "a.avi").read_bytes()[:5000])
    document = said(capsys, "predict", model, clips, clips / "absent.mp4", "--top", "1", code=3)
    assert [Path(row["video"]).name for row in document["predictions"]] == ["a.avi", "b.AVI"]
    assert [Path(each["video"]).name for each in document["failures"]] == ["b.mp4", "absent.mp4"]
    assert "truncated" in document["failures"][0]["reason"]


def test_rows_go_to_files_instead_of_the_table(
    model: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, parquet = tmp_path / "out" / "rows.jsonl", tmp_path / "out" / "rows.parquet"
    document = said(capsys, "predict", model, clips, "--top", "2", "--json", lines, "--parquet", parquet)
    assert (document["rows"], "predictions" in document) == (4, False)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert rows == pq.read_table(parquet).to_pylist()
    assert [row["rank"] for row in rows] == [1, 2, 1, 2]
    assert list(rows[0]) == ["video", "rank", "action", "probability"]


def test_windows_give_a_timeline(model: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = tmp_path / "timeline.parquet"
    options = ["--window", "1s", "--stride", "500ms", "--top", "1", "--parquet", parquet]
    said(capsys, "predict", model, clips / "a.avi", *options)  # 84 frames, 25 a second
    rows = pq.read_table(parquet).to_pylist()
    times = [(round(row["start"], 2), round(row["end"], 2)) for row in rows]
    assert times == [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.5), (2, 3), (2.36, 3.36)]
    assert len({row["probability"] for row in rows}) > 1


def test_attention_is_drawn_into_a_video(
    model: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "predict", model, clips, "--attention", tmp_path / "maps")
    said(capsys, "predict", model, clips / "a.avi", "--attention", tmp_path / "one.mp4")
    assert len(list((tmp_path / "maps").glob("*.mp4"))) == 2
    with av.open(str(tmp_path / "one.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 4
    height, width = frames[0].shape[:2]
    assert width == 2 * height >= 448
    plain, mixed = frames[0][:, : width // 2], frames[0][:, width // 2 :]
    assert abs(plain.astype(int) - mixed).mean() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{clips}", "--stride", "2s"], "give --window too"),
        (["{clips}", "--window", "soon"], "'soon' is no length of time"),
        (["{clips}", "--window", "1s", "--attention", "x.mp4"], "leave --window out"),
        (["{clips}", "--attention", "x.mp4"], "name a folder for 2"),
        (["{clips}/deeper/none*.mp4"], "no file matches"),
        (["{empty}"], "holds no video: none of its files ends in"),
    ],
)
def test_mistakes_end_as_one_sentence(
    model: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    filled = [each.format(clips=clips, empty=tmp_path / "empty") for each in arguments]
    error = said(capsys, "predict", model, *filled, code=2)["error"]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["models"], 0, '"models": ['),
        (["promote", "absent/1", "--reason", "why not"], 2, "there is no registered model 'absent'"),
        (["pull", "absent@best", "model"], 2, "there is no registered model 'absent'"),
        (["predict", "absent@best", "{clips}"], 2, "there is no registered model 'absent'"),
        (["export", "absent@best", "model.onnx", "--to", "onnx"], 2, "there is no registered model 'absent'"),
        (["deliver"], 0, '"waiting": {}'),
    ],
)
def test_verbs_that_ask_only_mlflow_need_no_s3_keys(
    mlflow_server: MlflowServer, clips: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    lab = tmp_path / "lab.toml"
    lab.write_text(
        'ray_address = "head:6379"\nray_dashboard = "http://head:8265"\nbucket = "lab"\n'
        f's3_endpoint = "http://127.0.0.1:9"\nmlflow = "{mlflow_server.uri}"\n'
    )
    keys = ("TAVLAD_S3_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "TAVLAD_S3_SECRET_KEY", "AWS_SECRET_ACCESS_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in keys}
    command = [sys.executable, "-m", "ray_jobs.cli", "--site", str(lab), "--json"]
    done = subprocess.run(
        [*command, *(each.format(clips=clips) for each in arguments)],
        env=environment | {"TMPDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done.stdout + done.stderr


def test_lengths_of_time_are_read_with_their_units() -> None:
    assert [seconds_of(text) for text in ("4s", "500ms", "1m", "2.5")] == [4, 0.5, 60, 2.5]
    for text in ("0s", "-1", "4h", "s", "nan", "inf"):
        with pytest.raises(ValueError, match="no length of time"):
            seconds_of(text)
