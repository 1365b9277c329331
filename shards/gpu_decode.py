"""JPEGs decoded, cropped and resized on a GPU by nvJPEG, for machines whose processors cannot keep up with it.

What it gives differs from the CPU's pixels by rounding: nvJPEG's transform and upsampling are others, and the resize is
computed in float32 (see tests/shards/test_gpu_decode.py). On a CPU the same code runs, for tests.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from shards.clip_bytes import decode_jpegs
from shards.transforms import TsnView, View, window_of


class GpuDecoder:
    """Makes views of clips, and the memory that their batches lie in, on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, num_clips: int, num_frames: int, size: int) -> UInt8[Tensor, "B T 3 size size"]:
        """A batch of undefined content. PyTorch uses its memory again by itself, when `tavlad.ahead` has told it which
        other streams read it."""
        with self._beside():
            return torch.empty(num_clips, num_frames, 3, size, size, dtype=torch.uint8, device=self._device)

    def fill(
        self, jpegs: Sequence[memoryview], view: View | TsnView | None, slot_TCHW: UInt8[Tensor, "T 3 S S"]
    ) -> None:
        """Write the view of each frame of a clip to its slot; done when this returns. Frames have one size."""
        size = slot_TCHW.shape[-1]
        with self._beside():
            frames_TCHW = torch.stack(decode_jpegs(jpegs, self._device))
            height, width = frames_TCHW.shape[2:]
            window = window_of(view, height, width, size)
            rows = slice(window.top, window.top + window.height)
            shown_TCHW = frames_TCHW[..., rows, window.left : window.left + window.width].float()
            resized_TCHW = F.interpolate(shown_TCHW, size=(size, size), mode="bilinear", antialias=True)
            slot_TCHW.copy_((resized_TCHW.flip(-1) if window.flip else resized_TCHW).round_().clamp_(0, 255))
        if self._stream is not None:
            self._stream.synchronize()  # this thread waits, nobody else: who is given the batch need not

    def _beside(self) -> AbstractContextManager[object]:
        """A stream of its own: beside the model's work, not behind it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
