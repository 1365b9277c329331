"""The world a training runs in: alone, or one of several ranks that share each batch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One process's place among the ranks; a world of one needs no process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    """Where this rank computes."""

    @staticmethod
    def current(device: torch.device = _CPU) -> "World":
        """The place in the process group that is open now; alone if none is."""
        if not dist.is_initialized():
            return World(device=device)
        return World(rank=dist.get_rank(), size=dist.get_world_size(), device=device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks; only what may learn is communicated."""
        if self.size == 1:
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


ALONE = World()
"""A training that shares its batches with nobody."""


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast, or nothing for precision "float32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
