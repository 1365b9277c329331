"""A clip's random draws are its own: neighbours, ranks and parts do not change them."""

import pytest
import torch

from tavlad.draws import ClipDropout, RandomFrame, seed_clips
from tavlad.reduction import nodes_within, parts_of

SEEDS = [5, 6, 7, 8]


@pytest.mark.parametrize("rows", [False, True])
def test_a_clip_drops_the_same_elements_whoever_is_beside_it(rows: bool) -> None:
    dropout = ClipDropout(0.5, rows=rows)
    x_BKU = torch.rand(4, 40, 3) + 1
    seed_clips(dropout, SEEDS)
    together = dropout(x_BKU)
    for clip, seed in enumerate(SEEDS):
        seed_clips(dropout, [seed])
        assert torch.equal(dropout(x_BKU[[clip]])[0], together[clip])
    assert not torch.equal(together[0] == 0, together[1] == 0), "each draws for itself"


def test_a_clip_shows_the_same_frame_whoever_is_beside_it() -> None:
    draw = RandomFrame()
    frames_BTX = torch.arange(100).repeat(4, 1)
    seed_clips(draw, SEEDS)
    together = draw(frames_BTX)
    seed_clips(draw, SEEDS[2:])
    assert torch.equal(draw(frames_BTX[2:]), together[2:])
    assert len(set(together.flatten().tolist())) > 1


def test_seeds_are_one_a_clip() -> None:
    dropout = ClipDropout(0.5)
    seed_clips(dropout, SEEDS)
    with pytest.raises(AssertionError, match="4 seeds for 3 clips"):
        dropout(torch.ones(3, 8))


@pytest.mark.parametrize("num_parts", [1, 2, 5, 8, 12])
def test_ranks_hold_whole_nodes_of_one_tree(num_parts: int) -> None:
    """Whatever the number of ranks, their nodes are the parts in order, and each is a node of the tree."""

    def tree(low: int, high: int) -> set[tuple[int, int]]:
        middle = (low + high) // 2
        return {(low, high)} | (tree(low, middle) | tree(middle, high) if high - low > 1 else set())

    for size in range(1, num_parts + 1):
        nodes = [nodes_within(parts_of(rank, size, num_parts), num_parts) for rank in range(size)]
        assert {node for each in nodes for node in each} <= tree(0, num_parts)
        flat = [node for each in nodes for node in each]
        assert [part for low, high in flat for part in range(low, high)] == list(range(num_parts))
    assert nodes_within(range(num_parts), num_parts) == [(0, num_parts)], "a rank alone adds up the whole tree"
