"""Contract 2: the order of an epoch is a function of (number of clips, seed, epoch) and of nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import batch_slice, epoch_order, num_steps

sizes = st.integers(1, 200)
batch_sizes = st.integers(1, 50)
seeds = st.integers(0, 2**63 - 1)


@given(num_clips=sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_every_clip_comes_once_an_epoch(num_clips: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(num_clips, seed, epoch)) == list(range(num_clips))


def test_order_is_the_same_in_every_version_of_numpy() -> None:
    # Written down once: a change here breaks the resuming of every run under way.
    assert epoch_order(12, seed=3, epoch=0).tolist() == [6, 1, 11, 8, 5, 2, 7, 10, 9, 4, 3, 0]
    assert epoch_order(12, seed=3, epoch=1).tolist() == [9, 7, 8, 3, 5, 6, 4, 0, 10, 2, 1, 11]


def test_seed_and_epoch_both_change_the_order() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_every_clip_is_equally_likely_at_every_place() -> None:
    places = np.stack([epoch_order(6, 0, epoch) for epoch in range(3000)])
    counts = np.array([[(places[:, place] == clip).sum() for clip in range(6)] for place in range(6)])
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 60  # 25 degrees of freedom: above 60 once in 10,000


@settings(max_examples=200)
@given(num_clips=sizes, batch_size=batch_sizes, world=st.integers(1, 7))
def test_parts_of_the_ranks_make_up_the_global_batch(num_clips: int, batch_size: int, world: int) -> None:
    order = epoch_order(num_clips, 1, 2)
    seen: list[int] = []
    for step in range(num_steps(num_clips, batch_size)):
        parts = [batch_slice(order, batch_size, step, rank, world).tolist() for rank in range(world)]
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        batch = [clip for part in parts for clip in part]
        assert batch == order[step * batch_size : (step + 1) * batch_size].tolist()
        seen += batch
    assert seen == order.tolist()


def test_last_short_batch_is_kept() -> None:
    assert num_steps(10, 4) == 3
    assert [len(batch_slice(np.arange(10), 4, step, 0, 1)) for step in range(3)] == [4, 4, 2]
    assert [batch_slice(np.arange(9), 4, 2, rank, 3).tolist() for rank in range(3)] == [[], [], [8]]


def test_negative_seed_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="seed -1"):
        epoch_order(5, seed=-1, epoch=0)


@pytest.mark.slow
def test_ten_million_clips_are_ordered_in_one_array() -> None:
    order = epoch_order(10_000_000, 0, 0)
    assert order.dtype == np.int64
    assert np.bincount(order).max() == 1
