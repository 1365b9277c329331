import ast
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pandas as pd
import pytest
import torch

from ray_jobs.clips import UnusableVideo, Windows, clip_of
from ray_jobs.served_model import ServedModel, sources_of, stage_code
from shards.datasets import scan
from shards.pack import finish, pack_shard
from shards.plan import PackOptions, plan_packing
from shards.read import ClipLoader, LoaderOptions
from shards.store import open_store
from shards.video import decode_clip
from tavlad.backbone import load_weights
from tavlad.checkpoint import ModelCard, load_model, save_checkpoint
from tavlad.config import Modality, ModelConfig
from tavlad.evaluate import evaluate
from tavlad.model import TaVlad
from tavlad.registry import register
from tavlad.runlog import RUN_TAG
from tavlad.tracking import create_run
from tests.mlflow_server import MlflowServer

CONFIG = ModelConfig(trunk="efficientnet_lite0", weights="none", num_clusters=4, gru_width=8)
CARD = ModelCard(
    model=CONFIG, actions=("clap", "jump", "wave"), num_frames=4, short_side=40, crop=32, precision="float32"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model on a real trunk, which answers differently for different clips."""
    torch.manual_seed(0)
    model = TaVlad(CONFIG, len(CARD.actions))
    load_weights(model.trunk, CONFIG.trunk, "imagenet")
    torch.nn.init.normal_(model.vlad.weight, std=3)
    torch.nn.init.normal_(model.classifier.weight, std=3)
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    save_checkpoint(directory, model, CARD)
    return directory


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each action with four videos of moving noise."""
    root = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    for action in CARD.actions:
        (root / action).mkdir()
        for number in range(4):
            picture = random.integers(0, 256, (64, 80, 3), dtype=np.uint8)
            write_video(root / action / f"{number}.mp4", [np.roll(picture, 3 * shift, axis=1) for shift in range(9)])
    return root


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# In bf16 the head's matrix products round differently for another number of clips at once.
@pytest.mark.parametrize(
    ("modality", "precision", "tolerance"),
    [("rgb", "float32", 1e-5), ("rgb", "bf16", 5e-3), ("flow", "float32", 1e-5), ("difference", "float32", 1e-5)],
)
def test_a_file_is_predicted_as_it_was_evaluated(
    directory: Path,
    videos: Path,
    tmp_path: Path,
    modality: Modality,
    precision: Literal["float32", "bf16"],
    tolerance: float,
) -> None:
    store = open_store(str(tmp_path / "set"))
    options = PackOptions(modality=modality, num_frames=4, short_side=40)
    plan = plan_packing(scan("noise", videos, "folders"), options)
    index = finish(plan, [pack_shard(plan, number, store) for number in range(len(plan.shards))], store)
    loader = ClipLoader(
        index, store, 1, "test", LoaderOptions(batch_size=2, seed=0, crop=32, augment=False, shuffle=False)
    )
    model, card = load_model(directory)
    directory = tmp_path / precision
    config = replace(card.model, modality=modality)
    save_checkpoint(directory, model, replace(card, precision=precision, model=config))
    scores = evaluate(model, loader.epoch(0), precision)
    sources = dict(zip(index.clips_table.keys(), index.clips_table.table["source"].to_pylist(), strict=True))
    assert len(scores.keys) >= 3
    for key, probabilities in zip(scores.keys, scores.probabilities, strict=True):
        table = ServedModel(directory).predict(str(videos / sources[key]), {"top": 3})
        expected = dict(zip(CARD.actions, probabilities.tolist(), strict=True))
        predicted = dict(zip(table["action"], table["probability"], strict=True))
        assert predicted == pytest.approx(expected, abs=tolerance)
    assert scores.probabilities.std(axis=0).max() > 1e-3


def test_paths_bytes_and_frames_of_a_video_give_one_answer(directory: Path, videos: Path) -> None:
    served = ServedModel(directory)
    paths = [videos / "clap" / "0.mp4", videos / "wave" / "1.mp4"]
    expected = served.predict([str(path) for path in paths])
    assert list(expected.columns) == ["video", "rank", "action", "probability"]
    assert expected["video"].tolist() == [str(path) for path in paths for _ in range(3)]
    assert expected["rank"].tolist() == [1, 2, 3] * 2
    cropped = torch.stack([clip_of(path, CARD) for path in paths])
    for same in (
        [path.read_bytes() for path in paths],
        pd.DataFrame({"video": [str(path) for path in paths]}),
        pd.Series(paths),
        np.array([str(path) for path in paths]),
        cropped.numpy(),
        cropped,
        [cropped[0].numpy(), paths[1]],
    ):
        answer = served.predict(same)
        assert answer["action"].tolist() == expected["action"].tolist()
        np.testing.assert_allclose(answer["probability"], expected["probability"], atol=1e-5)
    alone = served.predict(paths[0], params={"top": 1})
    assert alone["probability"].tolist() == pytest.approx([expected["probability"][0]], abs=1e-5)
    assert served.predict(cropped[0].numpy())["video"].tolist() == ["0"] * 3


def test_frames_of_another_size_and_number_are_chosen_and_cropped_as_decoded_ones(videos: Path) -> None:
    path = videos / "clap" / "0.mp4"
    whole = decode_clip(path, 9, 40).frames_THWC.transpose(0, 3, 1, 2)
    from_frames, from_file = clip_of(whole, CARD), clip_of(path, CARD)
    assert from_frames.shape == from_file.shape == (4, 3, 32, 32)
    assert (from_frames.float() - from_file.float()).abs().mean() < 8  # they differ by one JPEG


def test_a_model_of_flow_sees_the_motion_of_frames_and_refuses_windows(
    directory: Path, videos: Path, tmp_path: Path
) -> None:
    card = replace(CARD, model=replace(CONFIG, modality="flow"))
    path = videos / "clap" / "0.mp4"
    whole = decode_clip(path, 9, 40).frames_THWC.transpose(0, 3, 1, 2)
    from_frames, from_file = clip_of(whole, card), clip_of(path, card)
    assert from_frames.shape == from_file.shape == (4, 3, 32, 32)
    assert (from_frames.float() - from_file.float()).abs().mean() < 8  # they differ by one JPEG
    assert from_file[:, 0].float().mean() > 140, "everything moves to the right"
    model, _ = load_model(directory)
    save_checkpoint(tmp_path / "flow", model, card)
    served = ServedModel(tmp_path / "flow")
    with pytest.raises(ValueError, match="a model of flow sees whole videos: leave the windows out"):
        list(served.answers([path], windows=Windows(seconds=1, stride=1)))


def test_a_bad_video_is_named_and_the_others_are_predicted(directory: Path, videos: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"no video")
    good = videos / "clap" / "0.mp4"
    served = ServedModel(directory)
    answers = list(served.answers([good, bad, b"", good], top=1))
    said = [each.video if isinstance(each, UnusableVideo) else each.predictions[0].video for each in answers]
    assert said == [str(good), str(bad), "2", str(good)]
    assert [isinstance(each, UnusableVideo) for each in answers] == [False, True, True, False]
    with pytest.raises(ValueError, match=r"bad\.mp4: cannot be read as a video"):
        served.predict([str(good), str(bad)])


def test_windows_of_a_video_come_in_order_and_a_short_video_is_one_clip(
    directory: Path, videos: Path, tmp_path: Path
) -> None:
    served = ServedModel(directory)
    path = videos / "clap" / "0.mp4"  # 9 frames, 25 a second
    (whole,) = served.answers([path], windows=Windows(seconds=4, stride=2))
    (plain,) = served.answers([path])
    assert whole.predictions == plain.predictions
    windows = list(served.answers([path, path.parent / "1.mp4"], windows=Windows(seconds=0.16, stride=0.08)))
    assert [round(each.clip.start, 2) for each in windows] == [0, 0.08, 0.16, 0.2] * 2
    alone = list(served.answers([path], windows=Windows(seconds=0.16, stride=0.2)))
    assert torch.equal(alone[-1].clip.frames_TCHW, windows[3].clip.frames_TCHW)
    assert windows[3].predictions[0].probability != windows[0].predictions[0].probability


def test_decoding_ends_with_the_iteration_and_never_runs_far_ahead(directory: Path, videos: Path) -> None:
    asked: list[int] = []

    def endless() -> Iterator[Path]:
        while True:
            asked.append(1)
            yield videos / "clap" / "0.mp4"

    answers = ServedModel(directory, batch_size=2).answers(endless())
    for _ in range(6):
        next(answers)
    answers.close()
    assert len(asked) <= 6 + 2 + 4
    assert not [thread for thread in threading.enumerate() if thread.name == "decode"]


def test_attention_maps_come_when_asked_for(directory: Path, videos: Path) -> None:
    table = ServedModel(directory).predict([videos / "clap" / "0.mp4"], {"top": 2, "attention": True})
    assert list(table.columns) == ["video", "rank", "action", "probability", "attention"]
    assert table["attention"][0].shape == (4, 1, 1)
    assert table["attention"][1] is None
    assert 0 <= table["attention"][0].min() <= table["attention"][0].max() <= 1


@pytest.mark.parametrize(
    ("model_input", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\): pass uint8 RGB frames of shape \(T, 3, H, W\)"),
        (np.zeros((2, 3, 8, 8), np.float32), "frames are float32"),
        (pd.DataFrame({"a": ["x"], "b": ["y"]}), r"has one column, of paths or bytes; this one has \['a', 'b'\]"),
        ([1], "cannot predict from int: pass a path, bytes or uint8 frames"),
        (7, "cannot predict from int"),
    ],
)
def test_what_is_no_video_is_refused(model_input: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources_of(model_input)


BY_MLFLOW = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "webdataset", "boto3", "botocore", "infra"}:
            raise ImportError(f"{name} is not installed where a model is served")
sys.meta_path = [Refuse(), *(finder for finder in sys.meta_path if "editable" not in repr(finder))]
import mlflow
import numpy
mlflow.set_tracking_uri(sys.argv[1])
assert not {"tavlad", "shards", "ray_jobs"} & set(sys.modules)
model = mlflow.pyfunc.load_model(sys.argv[2])
tables = [model.predict(x) for x in ([sys.argv[3]], open(sys.argv[3], "rb").read(), numpy.load(sys.argv[4]))]
tables.append(model.predict([sys.argv[3]], params={"top": 1}))
ours = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] in ("tavlad", "shards", "ray_jobs")]
print(json.dumps([[table.values.tolist() for table in tables], ours]))
"""


def run_apart(program: str, *arguments: object) -> list:
    """Run a program in a process that starts with nothing of ours, in a folder without it."""
    command = [sys.executable, "-I", "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_staged_code_needs_only_what_it_names(tmp_path: Path) -> None:
    code = stage_code(tmp_path, CONFIG)
    assert "opencv-python-headless" not in str(code.pip_requirements)
    of_flow = stage_code(tmp_path / "flow", replace(CONFIG, modality="flow"))
    assert "opencv-python-headless==" in str(of_flow.pip_requirements)
    named = {requirement.partition("==")[0] for requirement in code.pip_requirements}
    assert "pillow" in named
    named.add("PIL")  # what it is imported as
    assert {path.name for path in code.code_paths} == {"tavlad", "shards", "ray_jobs"}
    for path in tmp_path.rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            modules: list[str] = []
            if isinstance(statement, ast.Import):
                modules = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom):
                modules = [statement.module or ""]
            for module in modules:
                room = module.partition(".")[0]
                is_ours = (tmp_path / Path(*module.split("."))).with_suffix(".py").exists() or (
                    tmp_path / Path(*module.split("."))
                ).is_dir()
                assert is_ours or room in named or room in sys.stdlib_module_names, (path.name, module)
    assert not [path for path in tmp_path.rglob("*.py") if path.stem in ("registry", "tracking", "store", "cli")]


@pytest.mark.slow
def test_a_registered_model_predicts_in_a_process_with_nothing_of_ours(
    mlflow_server: MlflowServer, directory: Path, videos: Path, tmp_path: Path
) -> None:
    uri, video = mlflow_server.uri, videos / "clap" / "0.mp4"
    run_id = create_run(uri, "tavlad/served", "train", {RUN_TAG: "served"}, {})
    code = stage_code(tmp_path / "code", CONFIG)
    register(uri, directory, run_id=run_id, name="tavlad-served-split1", tags={}, accuracy=0.5, code=code)
    np.save(tmp_path / "frames.npy", clip_of(video, CARD)[None].numpy())
    model_uri = "models:/tavlad-served-split1@best"
    tables, files = run_apart(BY_MLFLOW, uri, model_uri, video, tmp_path / "frames.npy")
    expected = ServedModel(directory).predict([str(video)])
    for table in tables[:3]:
        assert [row[2] for row in table] == expected["action"].tolist()
        np.testing.assert_allclose([row[3] for row in table], expected["probability"], atol=1e-5)
    assert len(tables[3]) == 1
    folder = Path(min(files, key=len)).parents[1]
    assert not folder.is_relative_to(Path(__file__).parents[2])
    loaded = {str(Path(file).relative_to(folder)) for file in files}
    assert loaded == {str(path.relative_to(tmp_path / "code")) for path in (tmp_path / "code").rglob("*.py")}
