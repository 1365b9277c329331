"""The program that travels with a registered model: video files, their bytes or frames in, a table of actions out.

It imports no Ray, no MLflow and no S3, so that it runs where only the model's own requirements are installed.

A video is treated exactly as it would be by packing, training's evaluation and nothing else: the same frames, the same
reduction to the packed size, through a JPEG of the packed quality and back, the same centre crop. So a model predicts
for a file what it was measured to predict. The JPEG costs a thirtieth of the forward pass.
"""

import ast
import shutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from torch import Tensor

from shards.clip_bytes import decode_jpeg, encode_jpeg
from shards.transforms import crop_clip
from shards.video import VideoError, decode_clip
from tavlad.checkpoint import ModelCard
from tavlad.clip import uniform_frame_indices
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
_PACKED_QUALITY = 90  # where the model's card does not say
_ROOMS = ("ray_jobs", "shards", "tavlad")

Source = str | Path | bytes | UInt8[np.ndarray, "T 3 H W"]
"""A video: its path, its bytes, or its frames."""


class ServedModel:
    """A registered model at work."""

    def __init__(self, directory: Path) -> None:
        self._predictor = Predictor(directory)

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The `params["top"]` most probable actions of each video, as (video, rank, action, probability).

        `model_input` is one or several of: a path of a video file; its bytes; an array of RGB frames, uint8 of shape
        (T, 3, H, W), or (B, T, 3, H, W) for several. They come in a list, a 1-d array, a Series or a DataFrame of one
        column. Arrays of the size the model was trained on are taken as they are; others are cropped as decoded frames
        are. Videos without a path are named by their place, from "0". ValueError names the video that cannot be used.
        """
        top = int((params or {}).get("top", DEFAULT_TOP))
        predictions, failures = self.predict_each(sources_of(model_input), top)
        if failures:
            raise ValueError("; ".join(reason for _, reason in failures))
        return pd.DataFrame([[getattr(row, name) for name, _ in COLUMNS] for row in predictions], columns=_names())

    def predict_each(self, sources: Iterable[Source], top: int) -> tuple[list[Prediction], list[tuple[str, str]]]:
        """Predictions of the videos that can be used, (video, reason) of those that cannot; memory stays bounded."""
        predictions: list[Prediction] = []
        failures: list[tuple[str, str]] = []
        clips = self._clips(sources, failures)
        while batch := list(islice(clips, self._predictor.batch_size)):
            frames_BTCHW = torch.stack([frames for _, frames in batch])
            videos = [video for video, _ in batch]
            predictions += self._predictor.table(self._predictor.predict_frames(frames_BTCHW), videos, top)
        return predictions, failures

    def _clips(self, sources: Iterable[Source], failures: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
        for place, source in enumerate(sources):
            video = str(source) if isinstance(source, str | Path) else str(place)
            try:
                frames = clip_of(source, self._predictor.card)
            except VideoError as error:
                failures.append((video, str(error)))
            else:
                yield video, frames


def clip_of(source: Source, card: ModelCard) -> UInt8[Tensor, "T 3 crop crop"]:
    """The frames a model sees of a video: what packing and evaluation would have made of it."""
    if isinstance(source, np.ndarray):
        indices = uniform_frame_indices(len(source), card.num_frames)
        frames_TCHW = torch.from_numpy(np.ascontiguousarray(source[indices]))
        is_cropped = frames_TCHW.shape[-2:] == (card.crop, card.crop)
        return frames_TCHW if is_cropped else crop_clip(frames_TCHW, None, card.crop)
    clip = decode_clip(source, card.num_frames, card.short_side)
    quality = int(card.provenance.get("jpeg_quality", _PACKED_QUALITY))
    frames_TCHW = torch.from_numpy(clip.frames_THWC).permute(0, 3, 1, 2)
    packed = [decode_jpeg(encode_jpeg(frame_CHW, quality)) for frame_CHW in frames_TCHW]
    return crop_clip(torch.stack(packed), None, card.crop)


def sources_of(model_input: Any) -> list[Source]:
    """The videos in whatever a caller passed. ValueError says what can be passed."""
    values = model_input
    if isinstance(values, pd.DataFrame):
        if values.shape[1] != 1:
            raise ValueError(
                f"a table of videos has one column, of paths or bytes; this one has {list(values.columns)}"
            )
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


def stage_code(destination: Path) -> "ServedCode":
    """Copy this module and those it imports into `destination`, and say how they are to be served.

    Only what is imported at the top of a module counts: imports inside functions are for other uses of it.
    """
    from tavlad.registry import ServedCode

    root = Path(__file__).resolve().parents[1]
    for module in _imported_modules(root):
        copy = destination / module.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, copy)
    return ServedCode(
        loader_module=__name__,
        code_paths=tuple(destination / room for room in _ROOMS),
        pip_requirements=tuple(f"{package}=={version(package).partition('+')[0]}" for package in _PACKAGES),
        outputs=COLUMNS,
        params={"top": DEFAULT_TOP},
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


def _names() -> list[str]:
    return [name for name, _ in COLUMNS]
