"""An exported program says what the model says, for any number of clips, on real ones too."""

import dataclasses
import importlib.util
import io
import json
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import jaxtyping
import numpy as np
import pytest
import torch

from tavlad import export as export_module
from tavlad.checkpoint import load_model, save_checkpoint
from tavlad.export import export
from tests.tavlad import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def unchecked_shapes() -> Generator[None]:
    """A traced program's sizes are symbols, which the checks of shapes take for no numbers."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def run_pt2(path: Path, frames: torch.Tensor) -> tuple[np.ndarray, dict]:
    extra = {"model_card.json": ""}
    program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra).module()
    return program(frames).detach().numpy(), json.loads(extra["model_card.json"])


def run_onnx(path: Path, frames: torch.Tensor) -> tuple[np.ndarray, dict]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    card = json.loads(session.get_modelmeta().custom_metadata_map["model_card"])
    return session.run(["probabilities"], {"frames": frames.numpy()})[0], card


@pytest.mark.parametrize(("kind", "run"), [("pt2", run_pt2), ("onnx", run_onnx)])
def test_a_program_says_what_the_model_says_on_real_clips(
    small_model: Path, real_clips: torch.Tensor, tmp_path: Path, kind: Literal["pt2", "onnx"], run
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="needs the extra export")
    exported = export(small_model, kind, tmp_path / f"model.{kind}", real_clips)
    assert exported.num_clips == len(real_clips)
    assert exported.difference < 1e-5
    model, _ = load_model(small_model)
    with torch.no_grad():
        expected = model(real_clips).softmax(dim=1).numpy()
    for num_clips in (1, 2, len(real_clips)):
        probabilities, card = run(exported.path, real_clips[:num_clips].contiguous())
        np.testing.assert_allclose(probabilities, expected[:num_clips], atol=1e-5)
        assert card["actions"] == ["clap", "jump", "wave"]
    assert expected.std(axis=0).max() > 1e-3
    assert [path.name for path in tmp_path.iterdir()] == [f"model.{kind}"]


def test_change_over_time_is_exported(tmp_path: Path) -> None:
    model = tiny.build_model(dataclasses.replace(tiny.CONFIG, temporal="change", attention="none"))
    save_checkpoint(tmp_path / "model", model, dataclasses.replace(tiny.CARD, model=model.config))
    clips = torch.randint(0, 256, (3, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert export(tmp_path / "model", "pt2", tmp_path / "model.pt2", clips).difference < 1e-5


def test_a_program_that_says_something_else_is_not_kept(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "_load_pt2", lambda path: lambda frames: np.full((len(frames), 3), 1 / 3))
    with pytest.raises(ValueError, match=r"differs from the model by .* it was not kept"):
        export(small_model, "pt2", tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_extra_that_has_them(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find(name, *rest)
    )
    with pytest.raises(ValueError, match=r"ONNX needs onnxscript: install the extra `export`"):
        export(small_model, "onnx", tmp_path / "model.onnx")
