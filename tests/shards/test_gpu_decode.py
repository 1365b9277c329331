"""Views made on a GPU are the CPU's but for rounding. On a CPU the same code runs, without nvJPEG."""

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.clip_bytes import decode_jpeg, encode_jpeg
from shards.gpu_decode import GpuDecoder
from shards.transforms import TSN_VIEWS, VIEWS, TsnView, View, crop_clip

_CPU, _GPU = torch.device("cpu"), torch.device("cuda")


def _jpegs(num_frames: int = 3, height: int = 120, width: int = 160) -> list[memoryview]:
    """A smooth picture that moves, with restart markers, as packing makes them."""
    rows, columns = np.mgrid[:height, :width]
    frames = [
        np.stack([127 + 120 * np.sin((rows * (1 + colour) + columns + 9 * number) / 17) for colour in range(3)])
        for number in range(num_frames)
    ]
    return [memoryview(encode_jpeg(torch.from_numpy(frame.astype(np.uint8)), 90)) for frame in frames]


def _difference(device: torch.device, view: View | TsnView | None, size: int) -> Tensor:
    jpegs, decoder = _jpegs(), GpuDecoder(device)
    (slot_TCHW,) = decoder.take(1, len(jpegs), size)
    decoder.fill(jpegs, view, slot_TCHW)
    expected = crop_clip(torch.stack([decode_jpeg(jpeg) for jpeg in jpegs]), view, size)
    assert slot_TCHW.device.type == device.type
    return (slot_TCHW.cpu().int() - expected.int()).abs()


@pytest.mark.parametrize("view", [None, *VIEWS[::7], TSN_VIEWS[0], TSN_VIEWS[101]])
@pytest.mark.parametrize("size", [64, 112])
def test_a_view_is_the_cpus_but_for_rounding(view: View | TsnView | None, size: int) -> None:
    difference = _difference(_CPU, view, size)
    assert difference.max() <= 1
    assert difference.float().mean() < 0.25, "most are equal"


@pytest.mark.needs_gpu
@pytest.mark.parametrize("view", [None, VIEWS[13], TSN_VIEWS[101]])
def test_nvjpegs_pixels_are_near_the_cpus(view: View | TsnView | None) -> None:
    difference = _difference(_GPU, view, 112)
    assert difference.float().mean() < 1
    assert difference.max() <= 8
