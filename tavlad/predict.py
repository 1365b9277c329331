"""Name the actions in clips with a trained model. Knows no video files: frames come in, probabilities go out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tavlad.checkpoint import load_model
from tavlad.parallel import autocast


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One row of a table of predictions."""

    video: str
    rank: int
    """1 for the most probable action."""
    action: str
    probability: float


class Predictor:
    """A model of a checkpoint directory, ready to predict as it was evaluated."""

    def __init__(self, directory: Path, *, device: str | None = None, batch_size: int = 8) -> None:
        """Load the model onto `device`, by default a GPU if there is one. ValueError if the directory holds none."""
        model, self.card = load_model(directory)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.to(self._device)
        self.batch_size = batch_size
        """Clips computed at once: bounds the memory."""

    @torch.no_grad()
    def predict_frames(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> Float[np.ndarray, "B A"]:
        """Probabilities of each action, from RGB frames 0-255 cropped to the side the model was trained on."""
        self._check(frames_BTCHW)
        parts: list[Tensor] = []
        for part_BTCHW in frames_BTCHW.split(self.batch_size):
            with autocast(self._device, self.card.precision):
                logits_BA = self._model(part_BTCHW.to(self._device))
            parts.append(logits_BA.float().softmax(dim=1).cpu())
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def attention(self, frames_BTCHW: UInt8[Tensor, "B T 3 H W"]) -> Float[np.ndarray, "B T h w"]:
        """Where the model looks in each frame, in [0, 1]; as `TaVlad.attention`."""
        self._check(frames_BTCHW)
        parts: list[Tensor] = []
        for part_BTCHW in frames_BTCHW.split(self.batch_size):
            with autocast(self._device, self.card.precision):
                parts.append(self._model.attention(part_BTCHW.to(self._device)).float().cpu())
        return torch.cat(parts).numpy()

    def table(self, probabilities_BA: Float[np.ndarray, "B A"], videos: Sequence[str], top: int) -> list[Prediction]:
        """The `top` most probable actions of each video, most probable first; ties go to the lower label."""
        return table(probabilities_BA, videos, self.card.actions, top)

    def _check(self, frames_BTCHW: Tensor) -> None:
        wanted = (self.card.num_frames, 3, self.card.crop, self.card.crop)
        if frames_BTCHW.dtype != torch.uint8 or tuple(frames_BTCHW.shape[1:]) != wanted or not len(frames_BTCHW):
            raise ValueError(
                f"frames are {frames_BTCHW.dtype} of shape {tuple(frames_BTCHW.shape)}: "
                f"this model takes uint8 of shape (clips, {', '.join(map(str, wanted))})"
            )


def table(
    probabilities_BA: Float[np.ndarray, "B A"], videos: Sequence[str], actions: Sequence[str], top: int
) -> list[Prediction]:
    """The `top` most probable actions of each video, most probable first; ties go to the lower label."""
    if top < 1:
        raise ValueError(f"top is {top}: ask for 1 action or more")
    assert probabilities_BA.shape == (len(videos), len(actions)), "one row a video, one column an action"
    ranking_BA = np.argsort(-probabilities_BA, axis=1, kind="stable")
    return [
        Prediction(video=video, rank=rank + 1, action=actions[int(label)], probability=float(row[label]))
        for video, row, labels in zip(videos, probabilities_BA, ranking_BA, strict=True)
        for rank, label in enumerate(labels[:top])
    ]
