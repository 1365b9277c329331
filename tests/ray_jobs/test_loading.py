"""How clips are read follows from what was measured; what the recipe says comes first."""

from dataclasses import replace

import pytest
import torch

from ray_jobs.loading import LoadingRates, choose_loading, cores_of_a_rank, measure_loading
from ray_jobs.recipe import ResourceConfig
from shards.read import ClipLoader, LoaderOptions
from tests.fixtures_sets import PackedSet
from tests.tavlad import tiny

RATES = LoadingRates(decode=0.006, score=0.002)  # 3.75 threads with the margin
AUTO = ResourceConfig()


@pytest.mark.parametrize(
    ("resources", "rates", "cores", "has_gpu", "threads", "on_gpu"),
    [
        (AUTO, RATES, 16, True, 4, False),
        (AUTO, RATES, 5, True, 4, False),
        (AUTO, RATES, 4, True, 3, True),  # one core is the training's
        (AUTO, RATES, 1, False, 1, False),
        (AUTO, replace(RATES, score=0.5), 16, False, 1, False),
        (AUTO, replace(RATES, score=0.0002), 16, True, 4, True),  # a GPU needs few threads to feed it
        (replace(AUTO, decode="cpu"), RATES, 2, True, 1, False),
        (replace(AUTO, decode="gpu"), RATES, 16, True, 4, True),
        (replace(AUTO, decode="gpu"), RATES, 16, False, 4, False),
        (replace(AUTO, loader_threads=9), RATES, 2, True, 9, False),
        (replace(AUTO, loader_threads=2), RATES, 16, True, 2, True),
    ],
)
def test_threads_and_decoder_follow_from_the_rates(
    resources: ResourceConfig, rates: LoadingRates, cores: int, has_gpu: bool, threads: int, on_gpu: bool
) -> None:
    found = choose_loading(resources, rates, cores, has_gpu=has_gpu)
    assert (found.threads, found.on_gpu) == (threads, on_gpu)


def test_the_choice_is_one_line_that_says_why() -> None:
    assert choose_loading(AUTO, RATES, 16, has_gpu=True).reason == (
        "clips are read by 4 threads: a clip takes 6.0 ms to decode and 2.0 ms to score"
    )
    assert "3 threads, decoded on the GPU" in choose_loading(AUTO, RATES, 4, has_gpu=True).reason
    slow = choose_loading(replace(AUTO, decode="cpu"), RATES, 3, has_gpu=True).reason
    assert slow.endswith("which 4 threads would keep up with")


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
