"""The model's random draws in training, a clip at a time: what a clip draws depends on its own seed alone, neither on
the clips beside it nor on the rank that computes it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class _ClipDraws(nn.Module):
    """Something that draws for each clip."""

    seeds: tuple[int, ...] = ()
    """One a clip of the next batch; with none, seeds are drawn from torch's generator."""

    def generators(self, num_clips: int, device: torch.device) -> Iterator[torch.Generator]:
        """A clip's own generator each, on the device."""
        seeds = self.seeds or torch.randint(2**62, (num_clips,)).tolist()
        assert len(seeds) == num_clips, f"{len(seeds)} seeds for {num_clips} clips"
        for seed in seeds:
            yield torch.Generator(device).manual_seed(seed)


class ClipDropout(_ClipDraws):
    """Dropout of single elements, or of whole rows: an element of the first dimension after the batch, all below it."""

    def __init__(self, probability: float, *, rows: bool = False) -> None:
        super().__init__()
        self.probability, self.rows = probability, rows

    def forward(self, x_BX: Tensor) -> Tensor:
        """What is kept, divided by the share that is; in evaluation the input itself."""
        if not self.training or self.probability == 0:
            return x_BX
        shape = (*x_BX.shape[:2], *[1] * (x_BX.dim() - 2)) if self.rows else x_BX.shape
        kept_BX = torch.empty(shape, dtype=x_BX.dtype, device=x_BX.device)
        for kept, generator in zip(kept_BX, self.generators(len(x_BX), x_BX.device), strict=True):
            kept.bernoulli_(1 - self.probability, generator=generator)
        return x_BX * kept_BX.div_(1 - self.probability)


class RandomFrame(_ClipDraws):
    """One frame of each clip, (B, T, ...) → (B, 1, ...)."""

    def forward(self, frames_BTX: Tensor) -> Tensor:
        """Drawn on the CPU, wherever the frames are."""
        num_clips, num_frames = frames_BTX.shape[:2]
        generators = self.generators(num_clips, torch.device("cpu"))
        rows_B = torch.tensor([int(torch.randint(num_frames, (), generator=each)) for each in generators])
        return frames_BTX[torch.arange(num_clips), rows_B][:, None]


def seed_clips(model: nn.Module, seeds: Sequence[int]) -> None:
    """The seeds of the clips that the model is given next."""
    for module in model.modules():
        if isinstance(module, _ClipDraws):
            module.seeds = tuple(seeds)
