"""How clips are read follows from what was measured; what the recipe says comes first."""

from dataclasses import replace
from typing import Literal

import pytest
import torch

from ray_jobs.loading import (
    GpuMemory,
    LoadingRates,
    choose_loading,
    cores_of_a_rank,
    measure_loading,
    memory_of,
)
from ray_jobs.recipe import ResourceConfig
from shards.read import ClipLoader, LoaderOptions, decode_frames
from tests.fixtures_sets import PackedSet
from tests.tavlad import tiny

RATES = LoadingRates(decode=0.006, score=0.002)  # 3.75 threads with the margin
AUTO = ResourceConfig()


FITS = GpuMemory(room=30, train=20, test=10)


@pytest.mark.parametrize(
    ("resources", "rates", "cores", "memory", "threads", "train", "test"),
    [
        (AUTO, RATES, 16, FITS, 4, "cpu", "cpu"),
        (AUTO, RATES, 5, FITS, 4, "cpu", "cpu"),
        (AUTO, RATES, 4, FITS, 3, "once", "once"),  # one core is the training's
        (AUTO, RATES, 4, replace(FITS, test=11), 3, "once", "cpu"),
        (AUTO, RATES, 4, replace(FITS, train=31), 3, "cpu", "cpu"),
        (AUTO, RATES, 1, None, 1, "cpu", "cpu"),
        (AUTO, replace(RATES, score=0.5), 16, None, 1, "cpu", "cpu"),
        (AUTO, replace(RATES, score=0.0002), 16, replace(FITS, train=31), 15, "cpu", "cpu"),
        (AUTO, replace(RATES, score=0.0002), 16, FITS, 15, "once", "once"),
        (replace(AUTO, decode="cpu"), RATES, 2, FITS, 1, "cpu", "cpu"),
        (replace(AUTO, decode="gpu"), RATES, 16, FITS, 4, "once", "once"),
        (replace(AUTO, decode="gpu"), RATES, 16, None, 4, "cpu", "cpu"),
        (replace(AUTO, loader_threads=9), RATES, 2, FITS, 9, "cpu", "cpu"),
        (replace(AUTO, loader_threads=2), RATES, 16, replace(FITS, room=1), 2, "cpu", "cpu"),
        (replace(AUTO, decode="gpu"), RATES, 16, replace(FITS, room=1), 4, "cpu", "cpu"),
    ],
)
def test_threads_and_decoder_follow_from_the_rates_and_the_memory(
    resources: ResourceConfig,
    rates: LoadingRates,
    cores: int,
    memory: GpuMemory | None,
    threads: int,
    train: str,
    test: str,
) -> None:
    found = choose_loading(resources, rates, cores, memory)
    assert (found.threads, found.train, found.test) == (threads, train, test)


def test_the_choice_is_one_line_that_says_why() -> None:
    assert choose_loading(AUTO, RATES, 16, FITS).reason == (
        "clips are read by 4 threads: a clip takes 6.0 ms to decode and 2.0 ms to score"
    )
    large = GpuMemory(room=20_000_000_000, train=12_000_000_000, test=7_000_000_000)
    assert (
        "3 threads, decoded once and kept in the GPU's memory (19.0 GB): a"
        in choose_loading(AUTO, RATES, 4, large).reason
    )
    small = replace(large, room=10_000_000_000)
    assert choose_loading(AUTO, RATES, 4, small).reason.endswith(
        "which 4 threads would keep up with; decoded, they take 12.0 GB, more than the GPU has room for"
    )
    slow = choose_loading(replace(AUTO, decode="cpu"), RATES, 3, FITS).reason
    assert slow.endswith("which 4 threads would keep up with")


@pytest.mark.parametrize("memory", [FITS, replace(FITS, room=1), None])
@pytest.mark.parametrize("decode", ["auto", "cpu", "gpu"])
def test_nvjpeg_is_only_what_a_recipe_asks_for(decode: Literal["auto", "cpu", "gpu"], memory: GpuMemory | None) -> None:
    """Its pixels are others: how quick something was must not choose them. Tested is what `predict` sees."""
    resources = replace(AUTO, decode=decode)
    for score in (1.0, 0.002, 0.00002):
        rates = replace(RATES, score=score)
        assert choose_loading(resources, rates, 4, memory).train != "nvjpeg"
        asked = choose_loading(resources, rates, 4, memory, nvjpeg=True)
        assert (asked.train, asked.test == "nvjpeg") == ("nvjpeg", False)
    assert choose_loading(resources, replace(RATES, score=0.00002), 16, memory, nvjpeg=True).threads == 4


def test_decoded_clips_take_the_memory_that_the_index_says(packed: PackedSet) -> None:
    clips = packed.index.clips(1, "train")
    frames = [decode_frames(packed.store.read_range(*clips.place(row)[1:4])) for row in range(len(clips))]
    assert packed.index.decoded_bytes(clips) == pytest.approx(sum(each.numel() for each in frames), rel=0.01)
    assert memory_of(torch.device("cpu"), 1.0, packed.index, 1) is None


def test_rates_are_measured_on_real_clips(packed: PackedSet) -> None:
    options = LoaderOptions(batch_size=4, seed=0, crop=32, augment=False, shuffle=False, num_threads=1)
    loader = ClipLoader(packed.index, packed.store, 1, "test", options)
    model = tiny.build_model()
    rates = measure_loading(model, loader, torch.device("cpu"), "float32", 4)
    assert 0 < rates.decode < 1
    assert 0 < rates.score < 10
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranks_of_a_node_share_its_processors() -> None:
    assert cores_of_a_rank(1) >= 1
    assert cores_of_a_rank(10_000) == 1


def test_threads_that_are_not_measured_are_a_few() -> None:
    assert AUTO.unmeasured_threads == 2
    assert replace(AUTO, loader_threads=5).unmeasured_threads == 5
    with pytest.raises(ValueError, match=r"resources\.loader_threads = -1: must not be negative"):
        replace(AUTO, loader_threads=-1)
