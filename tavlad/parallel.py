"""The world a training runs in: alone, or one of several ranks that share each batch."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tavlad.clip import Batch
from tavlad.precision import exact_float32
from tavlad.reduction import TreeSum, parts_of

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One process's place among the ranks; a world of one needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    """Where this rank computes."""
    virtual_ranks: int = 0
    """Parts that each global batch is cut into, computed one by one and added up in a fixed order (`TreeSum`), so that
    the result is the same to the bit for any number of ranks up to this one; 0: a part a rank, averaged by DDP."""

    @staticmethod
    def current(device: torch.device = _CPU, virtual_ranks: int = 0) -> "World":
        """The place in the process group that is open now; alone if none is."""
        if not dist.is_initialized():
            return World(device=device, virtual_ranks=virtual_ranks)
        return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device, virtual_ranks=virtual_ranks)

    @property
    def num_parts(self) -> int:
        """Contiguous parts of a global batch; the first of two neighbours may be a clip smaller."""
        return self.virtual_ranks or self.size

    @property
    def parts(self) -> range:
        """The parts that this rank computes."""
        return parts_of(self.rank, self.size, self.num_parts)

    def shares(self, batch: Batch) -> Iterator["Share"]:
        """This rank's batch by parts."""
        num_clips, num_parts = batch.num_clips_in_global_batch, self.num_parts
        bounds = [num_clips * part // num_parts for part in range(self.parts.start, self.parts.stop + 1)]
        first = bounds[0]
        assert len(batch.keys) == bounds[-1] - first, "a rank reads what it computes"
        for part, start, stop in zip(self.parts, bounds, bounds[1:], strict=False):
            share = batch if len(self.parts) == 1 else batch.part(start - first, stop - first)
            yield Share(part=part, positions=range(start, stop), batch=share)

    def tree_sum(self, model: nn.Module) -> TreeSum | None:
        """What adds up the parts' gradients, where it is not DDP that averages the ranks'."""
        if not self.virtual_ranks:
            return None
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return TreeSum(parameters, self.rank, self.size, self.virtual_ranks)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks; only what may learn is communicated."""
        if self.size == 1 or self.virtual_ranks:
            return model
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's tensor."""
        if self.size == 1:
            return values
        total = values.to(self.device)
        dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A part of a global batch."""

    part: int
    positions: range
    """Of its clips in the global batch."""
    batch: Batch
    """They themselves; none, where there are fewer clips than parts."""


ALONE = World()
"""A training that shares its batches with nobody."""


def quick_precision(device_type: str) -> Literal["bf16", "float32"]:
    """What `precision = "auto"` means on such a device: bf16 where there are instructions for it.

    Without them a CPU is two to four times as slow in bf16 as in float32 (docs/LOG.md, 2026-11-25).
    """
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
    return "bf16" if has_bf16 else "float32"


@contextmanager
def autocast(device: torch.device, precision: str) -> Generator[None]:
    """bf16 autocast, or none for precision "float32". What is in float32 either way is so on a GPU too."""
    if precision == "auto":
        precision = quick_precision(device.type)
    with exact_float32(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        yield
