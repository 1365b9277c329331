"""The program that travels with a registered model: video files, their bytes or frames in, a table of actions out.

It imports no Ray, no MLflow and no S3, so that it runs where only the model's own requirements are installed.
"""

import ast
import os
import shutil
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ray_jobs.clips import SeenClip, Source, UnusableVideo, Windows, read_ahead
from tavlad.config import ModelConfig
from tavlad.errors import UserError
from tavlad.predict import Prediction, Predictor

if TYPE_CHECKING:
    from tavlad.registry import ServedCode

COLUMNS: tuple[tuple[str, Literal["string", "long", "double"]], ...] = (
    ("video", "string"),
    ("rank", "long"),
    ("action", "string"),
    ("probability", "double"),
)
"""Of the table a served model returns, with MLflow's names of their types."""
DEFAULT_TOP = 5

_PACKAGES = ("av", "jaxtyping", "numpy", "pandas", "pillow", "safetensors", "torch", "torchvision")
_ROOMS = ("ray_jobs", "shards", "tavlad")
_MAX_DECODERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a model says of a clip."""

    clip: SeenClip
    predictions: list[Prediction]
    """The most probable actions, most probable first."""
    attention_Thw: Float[np.ndarray, "T h w"] | None
    """Where it looked, in [0, 1], when that was asked for."""


class ServedModel:
    """A registered model at work."""

    def __init__(self, directory: Path, *, batch_size: int = 8) -> None:
        self._predictor = Predictor(directory, batch_size=batch_size)
        self.card = self._predictor.card

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The `params["top"]` most probable actions of each video, as (video, rank, action, probability).

        `model_input` is one or several of: a path of a video file; its bytes; an array of RGB frames, uint8 of shape
        (T, 3, H, W), or (B, T, 3, H, W) for several (all of a video's, for a model of motion). They come in a list, a
        1-d array, a Series or a DataFrame of one column. Arrays of the size the model was trained on are taken as they
        are; others are cropped as decoded frames are. Videos without a path are named by their place, from "0".
        `params["attention"]` adds a column `attention`: the maps (T, h, w) in [0, 1] in a video's first row. ValueError
        names the video that cannot be used.
        """
        settings = params or {}
        wants_attention = bool(settings.get("attention", False))
        rows: list[list[object]] = []
        for answer in self.answers(
            sources_of(model_input), int(settings.get("top", DEFAULT_TOP)), attention=wants_attention
        ):
            if isinstance(answer, UnusableVideo):
                raise UserError(answer.reason)
            for row in answer.predictions:
                maps = [answer.attention_Thw if row.rank == 1 else None] if wants_attention else []
                rows.append([getattr(row, name) for name, _ in COLUMNS] + maps)
        return pd.DataFrame(rows, columns=[name for name, _ in COLUMNS] + ["attention"] * wants_attention)

    def answers(
        self,
        sources: Iterable[Source],
        top: int = DEFAULT_TOP,
        *,
        windows: Windows | None = None,
        attention: bool = False,
    ) -> Generator[Answer | UnusableVideo]:
        """What the model says of each video, or of each window of each, in order; memory stays bounded.

        Videos that cannot be used come in their place. Threads decode the next videos while the model computes.
        """
        num_threads = min(_MAX_DECODERS, os.cpu_count() or 1)
        clips = read_ahead(sources, self.card, windows, num_threads)
        try:
            while batch := list(islice(clips, self._predictor.batch_size)):
                yield from self._answer(batch, top, attention)
        finally:
            clips.close()

    def _answer(
        self, batch: list[SeenClip | UnusableVideo], top: int, attention: bool
    ) -> Generator[Answer | UnusableVideo]:
        seen = [each for each in batch if isinstance(each, SeenClip)]
        predictions: list[list[Prediction]] = []
        maps_BThw = None
        if seen:
            frames_BTCHW = torch.stack([clip.frames_TCHW for clip in seen])
            probabilities_BA = self._predictor.predict_frames(frames_BTCHW)
            for clip, row_A in zip(seen, probabilities_BA, strict=True):
                predictions.append(self._predictor.table(row_A[None], [clip.video], top))
            maps_BThw = self._predictor.attention(frames_BTCHW) if attention else None
        place = 0
        for clip in batch:
            if isinstance(clip, UnusableVideo):
                yield clip
            else:
                maps = None if maps_BThw is None else maps_BThw[place]
                yield Answer(clip=clip, predictions=predictions[place], attention_Thw=maps)
                place += 1


def sources_of(model_input: Any) -> list[Source]:
    """The videos in whatever a caller passed. ValueError says what can be passed."""
    values = model_input
    if isinstance(values, pd.DataFrame):
        if values.shape[1] != 1:
            columns = list(values.columns)
            raise ValueError(f"a table of videos has one column, of paths or bytes; this one has {columns}")
        values = values.iloc[:, 0]
    if isinstance(values, Tensor):
        values = values.numpy()
    if isinstance(values, str | Path | bytes) or (isinstance(values, np.ndarray) and values.ndim == 4):
        values = [values]
    if isinstance(values, pd.Series):
        values = values.tolist()
    if not isinstance(values, list | tuple | np.ndarray):
        raise ValueError(f"cannot predict from {type(values).__name__}: pass paths, bytes or uint8 frames")
    return [_source_of(value) for value in values]


def _source_of(value: Any) -> Source:
    if isinstance(value, Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[1] != 3 or not len(value):
            raise ValueError(
                f"frames are {value.dtype} of shape {value.shape}: "
                "pass uint8 RGB frames of shape (T, 3, H, W) for a clip, (B, T, 3, H, W) for several"
            )
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str | Path | bytes):
        return value
    raise ValueError(f"cannot predict from {type(value).__name__}: pass a path, bytes or uint8 frames for each video")


def _load_pyfunc(data_path: str) -> ServedModel:  # pyright: ignore[reportUnusedFunction]
    """What MLflow calls to load a registered model."""
    return ServedModel(Path(data_path))


def stage_code(destination: Path, model: ModelConfig) -> "ServedCode":
    """Copy this module and those it imports into `destination`, and say how they are to be served.

    Only what is imported at the top of a module counts: imports inside functions are for other uses of it. A
    model whose trunk is one of timm's needs timm, one of motion OpenCV.
    """
    from tavlad.registry import ServedCode

    packages = list(_PACKAGES)
    packages += ["timm"] * model.trunk.startswith("timm:") + ["opencv-python-headless"] * (model.modality != "rgb")
    root = Path(__file__).resolve().parents[1]
    for module in _imported_modules(root):
        copy = destination / module.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, copy)
    return ServedCode(
        loader_module=__name__,
        code_paths=tuple(destination / room for room in _ROOMS),
        pip_requirements=tuple(f"{package}=={version(package).partition('+')[0]}" for package in packages),
        outputs=COLUMNS,
        params={"top": DEFAULT_TOP, "attention": False},
    )


def _imported_modules(root: Path) -> list[Path]:
    """Files of this module and of all modules of ours that it imports, directly or not."""
    waiting, found = [Path(__file__).resolve()], set[Path]()
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found |= {path, path.parent / "__init__.py"}
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            names: list[str] = []
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.module is not None:
                names = [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)]
            candidates = [root.joinpath(*name.split(".")).with_suffix(".py") for name in names]
            waiting += [each for each in candidates if each.exists() and each.parent.name in _ROOMS]
    return sorted(found)
