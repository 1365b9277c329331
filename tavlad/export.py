"""A model as one file that runs without this code: a torch.export program (.pt2) or ONNX, for any number of clips.

The program takes uint8 RGB frames (B, T, 3, crop, crop) named `frames` and returns `probabilities` (B, A), in float32.
The names of the actions travel in it: `extra_files["model_card.json"]` of a .pt2, the metadata `model_card` of ONNX.
"""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tavlad.checkpoint import ModelCard, load_model
from tavlad.errors import UserError
from tavlad.model import TaVlad

Format = Literal["pt2", "onnx"]

TOLERANCE = 1e-4
"""Largest difference between a program's probabilities and the model's, both in float32, that is let through."""

_CARD = "model_card.json"
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_OPSET = 20
_CLIPS_OF_EXAMPLE = 2  # a program traced with 1 clip takes 1 clip only


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A file that was written and found to compute what the model does."""

    path: Path
    num_clips: int
    """Clips it was compared on."""
    difference: float
    """Largest difference of a probability."""


def export(
    directory: Path, kind: Format, path: Path, clips_BTCHW: UInt8[Tensor, "B T 3 H W"] | None = None
) -> Exported:
    """Write the model of a checkpoint directory to `path`, then compare the file with the model.

    Compared are `clips_BTCHW` if given, else clips of noise, as a batch and one by one. ValueError when a package is
    missing, or when the file computes something else (it is removed then).
    """
    if kind == "onnx":
        _require_onnx()
    model, card = load_model(directory)
    program = _Program(model.float()).eval()
    example = _noise(card, _CLIPS_OF_EXAMPLE)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with _quiet(), torch.no_grad():  # else what is kept is how the model is trained
        exported = torch.export.export(program, (example,), dynamic_shapes=({0: torch.export.Dim("clips", min=1)},))
        if kind == "pt2":
            torch.export.save(exported, partial, extra_files={_CARD: _text_of(card)})
        else:
            _write_onnx(exported, example, card, partial)
    run = _load_pt2(partial) if kind == "pt2" else _load_onnx(partial)
    checked = _noise(card, _CLIPS_OF_EXAMPLE + 1) if clips_BTCHW is None else clips_BTCHW
    difference = _largest_difference(program, run, checked)
    if not difference <= TOLERANCE:
        partial.unlink()
        raise ValueError(
            f"the {kind} program of {directory} differs from the model by {difference:.2g} in a probability, more than "
            f"{TOLERANCE}: it was not kept"
        )
    partial.replace(path)
    return Exported(path=path, num_clips=len(checked), difference=difference)


class _Program(nn.Module):
    """What is exported: frames in, probabilities out."""

    def __init__(self, model: TaVlad) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        return self.model(frames).softmax(dim=1)


class _Runner:
    """An exported program at work."""

    def __init__(self, run: Any) -> None:  # a function of either library
        self._run = run

    def __call__(self, frames_BTCHW: Tensor) -> Float[np.ndarray, "B A"]:
        return self._run(frames_BTCHW)


def _load_pt2(path: Path) -> _Runner:
    with path.open("rb") as file:
        module = torch.export.load(io.BytesIO(file.read())).module()
    return _Runner(lambda frames: module(frames).detach().numpy())


def _write_onnx(exported: torch.export.ExportedProgram, example: Tensor, card: ModelCard, path: Path) -> None:
    import onnx

    program = torch.onnx.export(
        exported,
        (example,),
        input_names=["frames"],
        output_names=["probabilities"],
        opset_version=_ONNX_OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    model = onnx.load(str(path))
    entry = model.metadata_props.add()
    entry.key, entry.value = "model_card", _text_of(card)
    onnx.save(model, str(path))


def _load_onnx(path: Path) -> _Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return _Runner(lambda frames: session.run(["probabilities"], {"frames": frames.numpy()})[0])


@torch.no_grad()
def _largest_difference(program: _Program, run: _Runner, clips_BTCHW: Tensor) -> float:
    """Over the clips as one batch and each alone: what was traced with one number must hold for others."""
    expected = program(clips_BTCHW).numpy()
    together = run(clips_BTCHW.contiguous())
    alone = np.concatenate([run(clip[None].contiguous()) for clip in clips_BTCHW])
    return float(max(np.abs(together - expected).max(), np.abs(alone - expected).max()))


def _noise(card: ModelCard, num_clips: int) -> UInt8[Tensor, "B T 3 H W"]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_clips, card.num_frames, 3, card.crop, card.crop)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _text_of(card: ModelCard) -> str:
    return json.dumps(asdict(card), ensure_ascii=False)


def _require_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: install the extra `export`, pip install 'tavlad[export]'")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """The exporters' own chatter, which no user can act on, is left out."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
