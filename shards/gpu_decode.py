"""Views of clips made on a GPU: of decoded clips that stay in its memory, so that a CPU decodes each once; or of JPEGs
that nvJPEG decodes there, for those who ask for it.

The views of a clip that stays are the CPU's, pixel by pixel. nvJPEG's are not: it repeats colours where the CPU's
decoder interpolates (see tests/shards/test_gpu_decode.py). On a CPU the same code runs, for tests.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import UInt8
from torch import Tensor

from shards.clip_bytes import decode_jpegs
from shards.resize import resize
from shards.transforms import TsnView, View, window_of

Wanted = tuple[str, View | TsnView | None, Tensor]
"""Key of a clip that stays, the view of it that is wanted, and the slot (T, 3, S, S) for that."""


class GpuDecoder:
    """Makes views of clips, and the memory that their batches lie in, on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: dict[str, UInt8[Tensor, "T 3 H W"]] = {}

    def take(self, num_clips: int, num_frames: int, size: int) -> UInt8[Tensor, "B T 3 size size"]:
        """A batch of undefined content. PyTorch uses its memory again by itself, when `tavlad.ahead` has told it which
        other streams read it."""
        with self._beside():
            return torch.empty(num_clips, num_frames, 3, size, size, dtype=torch.uint8, device=self._device)

    def fill(
        self, jpegs: Sequence[memoryview], view: View | TsnView | None, slot_TCHW: UInt8[Tensor, "T 3 S S"]
    ) -> None:
        """Decode a clip and write the view of each frame to its slot; done when this returns. Frames have one size."""
        with self._beside():
            _show(torch.stack(decode_jpegs(jpegs, self._device)), view, slot_TCHW)
        self._wait()

    def keep(self, key: str, frames_TCHW: UInt8[Tensor, "T 3 H W"]) -> None:
        """Hold on to a decoded clip."""
        with self._beside():
            self._kept[key] = frames_TCHW.to(self._device).contiguous()

    def keeps(self, key: str) -> bool:
        """Whether the clip of this key is held."""
        return key in self._kept

    def show(self, clips: Iterable[Wanted]) -> None:
        """Write views of clips that are held to their slots; done when this returns."""
        with self._beside():
            for key, view, slot_TCHW in clips:
                _show(self._kept[key], view, slot_TCHW)
        self._wait()

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()  # this thread waits, nobody else: who is given the batch need not

    def _beside(self) -> AbstractContextManager[object]:
        """A stream of its own: beside the model's work, not behind it."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _show(
    frames_TCHW: UInt8[Tensor, "T 3 H W"], view: View | TsnView | None, slot_TCHW: UInt8[Tensor, "T 3 S S"]
) -> None:
    size = slot_TCHW.shape[-1]
    height, width = frames_TCHW.shape[2:]
    window = window_of(view, height, width, size)
    rows = slice(window.top, window.top + window.height)
    resized_TCHW = resize(frames_TCHW[..., rows, window.left : window.left + window.width], size, size)
    slot_TCHW.copy_(resized_TCHW.flip(-1) if window.flip else resized_TCHW)
