"""Views of clips that stay on a GPU are the CPU's, pixel by pixel. On a CPU the same code runs, without nvJPEG."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from shards.clip_bytes import decode_jpeg, decode_jpegs, encode_jpeg
from shards.gpu_decode import GpuDecoder
from shards.read import ClipLoader, LoaderOptions
from shards.transforms import TSN_VIEWS, VIEWS, TsnView, View, crop_clip

if TYPE_CHECKING:  # which needs PyAV, and a bare GPU host has none
    from tests.fixtures_sets import PackedSet

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
def test_a_view_is_the_cpus(view: View | TsnView | None, size: int) -> None:
    assert _difference(_CPU, view, size).max() == 0


def _error(jpegs: list[memoryview]) -> Tensor:
    """Of nvJPEG's pixels against the CPU's."""
    found, expected = decode_jpegs(jpegs, _GPU), decode_jpegs(jpegs, _CPU)
    return (torch.stack(found).cpu().int() - torch.stack(expected).int()).abs().float()


@pytest.mark.needs_gpu
def test_nvjpeg_gives_the_cpus_pixels_but_repeats_colours_where_the_cpu_interpolates() -> None:
    coloured = _jpegs()
    grey = [frame.float().mean(0, keepdim=True).byte().expand(3, -1, -1) for frame in decode_jpegs(coloured, _CPU)]
    assert _error([memoryview(encode_jpeg(frame, 90)) for frame in grey]).max() <= 2
    assert _error(coloured).mean() < 5
    assert _error(coloured).max() <= 32


@pytest.mark.needs_gpu
@pytest.mark.parametrize("view", [None, VIEWS[13], TSN_VIEWS[101]])
def test_views_of_clips_that_stay_on_a_gpu_are_the_cpus(view: View | TsnView | None) -> None:
    frames_TCHW, decoder = torch.stack(decode_jpegs(_jpegs(), _CPU)), GpuDecoder(_GPU)
    (slot_TCHW,) = decoder.take(1, len(frames_TCHW), 112)
    decoder.keep("clip", frames_TCHW)
    decoder.show([("clip", view, slot_TCHW)])
    assert torch.equal(slot_TCHW.cpu(), crop_clip(frames_TCHW, view, 112))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_clips_that_stay_are_read_and_decoded_once(packed: "PackedSet", num_threads: int, watched: type) -> None:
    store = watched(packed.store)
    by_cpu = LoaderOptions(batch_size=5, seed=3, crop=24, augment=True, shuffle=True, num_threads=num_threads)
    staying = dataclasses.replace(by_cpu, gpu=_CPU, keep_decoded=True)
    loaders = [
        ClipLoader(packed.index, packed.store, 1, "train", by_cpu),
        ClipLoader(packed.index, store, 1, "train", staying),
    ]
    for epoch in range(3):
        for expected, found in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            assert found.keys == expected.keys
            assert torch.equal(found.frames_BTCHW, expected.frames_BTCHW)
    assert len(store.reads) == loaders[0].num_clips
    resumed = ClipLoader(packed.index, store, 1, "train", staying)
    whole = list(loaders[1].epoch(1))[1:]
    assert all(
        torch.equal(one.frames_BTCHW, other.frames_BTCHW)
        for one, other in zip(whole, resumed.epoch(1, start_step=1), strict=True)
    ), "what a clip looks like is no matter of when it was decoded"
