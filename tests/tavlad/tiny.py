"""A training small enough for a test: a ResNet-18 with random weights, clips of 3 frames of 32 pixels, 4 actions."""

from collections.abc import Iterator

import numpy as np
import torch

from tavlad.checkpoint import ModelCard
from tavlad.clip import ClipBatch
from tavlad.config import ModelConfig, StageConfig, TrainingConfig
from tavlad.model import TaVlad
from tavlad.reduction import parts_of

NUM_ACTIONS = 4
CONFIG = ModelConfig(trunk="resnet18", weights="none", num_clusters=3, gru_width=5, alpha=5.0)
TRAINING = TrainingConfig(batch_size=4, precision="float32", crop=32)
STAGE1 = StageConfig(epochs=2, lr=1e-2)
STAGE2 = StageConfig(epochs=2, lr=1e-3, trunk="last-block", fc=True, vlad=True)
CARD = ModelCard(model=CONFIG, actions=("a", "b", "c", "d"), num_frames=3, short_side=32, crop=32, precision="float32")


def build_model(config: ModelConfig = CONFIG, seed: int = 0) -> TaVlad:
    """A model with random centres, the same for the same seed."""
    torch.manual_seed(seed)
    model = TaVlad(config, NUM_ACTIONS)
    if model.vlad is not None:
        centres_KD = torch.nn.functional.normalize(torch.rand_like(model.vlad.centres), dim=1)
        model.vlad.initialise(centres_KD, config.alpha)
    return model


class TinyBatches:
    """Random clips in an order that the epoch decides, dealt to ranks; the last batch is short."""

    def __init__(
        self, num_clips: int = 10, batch_size: int = 4, rank: int = 0, world: int = 1, num_parts: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(7)
        self._frames = torch.randint(0, 256, (num_clips, 3, 3, 32, 32), dtype=torch.uint8, generator=generator)
        self._labels = torch.arange(num_clips) % NUM_ACTIONS
        self._batch_size, self._rank, self._world = batch_size, rank, world
        self._num_parts = num_parts or world

    @property
    def num_steps(self) -> int:
        return -(-len(self._labels) // self._batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[ClipBatch]:
        order = np.random.default_rng(epoch).permutation(len(self._labels))
        for step in range(start_step, self.num_steps):
            rows = order[step * self._batch_size : (step + 1) * self._batch_size]
            parts = parts_of(self._rank, self._world, self._num_parts)
            bounds = (len(rows) * each // self._num_parts for each in (parts.start, parts.stop))
            own = torch.from_numpy(rows[slice(*bounds)])
            yield ClipBatch(
                frames_BTCHW=self._frames[own],
                labels_B=self._labels[own],
                keys=tuple(f"clip{row}" for row in own.tolist()),
                num_clips_in_global_batch=len(rows),
            )
