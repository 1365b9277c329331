"""Memory for batches, used again once nobody holds a batch that lies in it.

Fresh memory costs its page faults, up to a tenth of reading a clip. A batch's tensor holds on to the array below it,
and so do all its views; when the last is gone, the array's memory is free for another batch.
"""

import weakref

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


class BatchMemory:
    """Gives out uint8 batches whose channels come last in memory."""

    def __init__(self, *, pin: bool = False) -> None:
        self._pin = pin
        self._free: list[np.ndarray] = []

    def take(self, num_clips: int, num_frames: int, size: int) -> UInt8[Tensor, "B T 3 size size"]:
        """A batch of undefined content."""
        shape = (num_clips, num_frames, size, size, 3)
        if self._pin:  # PyTorch uses page-locked memory again by itself, and knows when copies out of it are done
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True).movedim(-1, -3)
        num_bytes = int(np.prod(shape))
        memory = self._take(num_bytes)
        batch = memory[:num_bytes].reshape(shape)
        weakref.finalize(batch, self._free.append, memory).atexit = False
        return torch.from_numpy(batch).movedim(-1, -3)

    def _take(self, num_bytes: int) -> np.ndarray:
        while self._free:
            memory = self._free.pop()
            if len(memory) >= num_bytes:
                return memory
        return np.empty(num_bytes, dtype=np.uint8)
