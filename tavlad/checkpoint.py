"""A model on disk: safetensors and JSON, plus what resuming needs. No pickle is needed to load a model (contract 4)."""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tavlad.config import ModelConfig, parse
from tavlad.errors import UserError
from tavlad.model import TaVlad

FORMAT = 2
_LOST_ACTIVATIONS = 1
"""The format of models whose frozen trunk ran without the activations that timm's norms hold."""
WEIGHTS = "weights.safetensors"
CARD = "config.json"
STATE = "state.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """All that is needed, beside the weights, to build the model again and feed it as it was fed."""

    model: ModelConfig
    actions: tuple[str, ...]
    """Names in label order."""
    num_frames: int
    """T, frames of a clip."""
    short_side: int
    """Pixels the short side of a video is reduced to, when longer, before cropping."""
    crop: int
    """Side of the square the trunk sees, in pixels."""
    precision: Literal["bf16", "float32"]
    """Of the trunk, in evaluation and in prediction."""
    format: int = FORMAT
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: data set fingerprint, split, run, trunk weights, code; not needed to load it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where a training stands after a step: all that resuming needs beside the weights."""

    stage: int
    """1 or 2."""
    next_epoch: int
    """The epoch to run next, or to go on with, from 0; equal to the stage's epochs when it is done."""
    optimizer: dict[str, Any]
    """The optimiser's state_dict."""
    next_step: int = 0
    """The step of that epoch to run next, from 0."""
    sums: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Loss, right answers and clips of that epoch so far, over all ranks."""


def weights_of(model: TaVlad) -> dict[str, torch.Tensor]:
    """A copy of the weights, on the CPU, that training on does not change."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}


def save_checkpoint(directory: Path, model: TaVlad, card: ModelCard, state: TrainState | None = None) -> None:
    """Write a checkpoint directory that lasts, in place of an older one of the same name.

    Whenever the process dies or the power fails, what the functions of this module load from `directory` is whole, and
    is the one before or this one.
    """
    partial, replaced = directory.with_name(f"{directory.name}.partial-{os.getpid()}"), _replaced(directory)
    shutil.rmtree(partial, ignore_errors=True)
    write_checkpoint(partial, weights_of(model), card, state)
    for path in (*partial.iterdir(), partial):
        _sync(path)
    if directory.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # left by a process that died below
        directory.rename(replaced)
    partial.rename(directory)
    _sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_checkpoint(
    directory: Path, weights: dict[str, torch.Tensor], card: ModelCard, state: TrainState | None = None
) -> None:
    """Write the files of a checkpoint to a new folder, from where they go elsewhere."""
    directory.mkdir(parents=True)
    save_file(weights, directory / WEIGHTS)
    (directory / CARD).write_text(
        json.dumps(dataclasses.asdict(card), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    if state is not None:
        values = {each.name: getattr(state, each.name) for each in dataclasses.fields(state)}
        torch.save(values, directory / STATE)


def _replaced(directory: Path) -> Path:
    """Where a checkpoint is while another one takes its place: no folder can be renamed onto one with files."""
    return directory.with_name(f"{directory.name}.replaced")


def _whole(directory: Path) -> Path:
    """Where the checkpoint is now."""
    replaced = _replaced(directory)
    return replaced if not directory.exists() and replaced.exists() else directory


def _sync(path: Path) -> None:
    """What the file or folder holds is on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_card(directory: Path) -> ModelCard:
    """The card of a checkpoint directory. Raises ValueError if it is absent, damaged or of another format."""
    path = _whole(directory) / CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} holds no model: it has no {CARD}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch the model again") from None
    if values.get("format") not in (_LOST_ACTIVATIONS, FORMAT):
        raise UserError(
            f"{path} has format {values.get('format')}, this version reads format {FORMAT}: "
            "update tavlad or fetch the model again"
        )
    return parse(ModelCard, values)


def load_model(directory: Path) -> tuple[TaVlad, ModelCard]:
    """Build the model of a checkpoint directory with its weights, in evaluation mode on the CPU."""
    card = load_card(directory)
    model = TaVlad(card.model, len(card.actions))
    norms = (module for module in model.trunk.modules() if isinstance(module, nn.BatchNorm2d))
    if card.format == _LOST_ACTIVATIONS and any(list(norm.children()) for norm in norms):
        raise UserError(
            f'{directory}: trunk = "{card.model.trunk}" ran without its activations while this model was trained, by a '
            "version of tavlad that lost them, and would name other actions with them: train it again"
        )
    load_weights_into(model, directory)
    return model.eval(), card


def load_weights_into(model: TaVlad, directory: Path) -> None:
    """Fill the model from a checkpoint. Raises ValueError naming the first tensor that does not fit."""
    path = _whole(directory) / WEIGHTS
    try:
        weights = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): fetch the checkpoint again") from None
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{path} is of another configuration: tensor {name} has shape {found.get(name, 'none')}, this model's "
                f"is {expected.get(name, 'none')}; use the recipe the checkpoint was trained with"
            )
    model.load_state_dict(weights)


def load_state(directory: Path) -> TrainState:
    """What resuming needs, from a checkpoint directory that has it."""
    path = _whole(directory) / STATE
    try:
        values = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"{directory} cannot be resumed from: it has no {STATE}") from None
    return TrainState(**values)
