"""The order of an epoch (contract 2): pure functions of (number of clips, seed, epoch), the same on every machine."""

import numpy as np
from jaxtyping import Int64


def epoch_order(num_clips: int, seed: int, epoch: int) -> Int64[np.ndarray, " N"]:
    """The global permutation of an epoch's clips.

    Clip i draws the i-th 64-bit word of the Philox4x64-10 stream with key (seed, epoch); clips are sorted by their
    draws. Raw words, unlike numpy's shuffles, are the same in every version of numpy.
    """
    if not (0 <= seed < 2**63 and 0 <= epoch < 2**63):
        raise ValueError(f"seed {seed} and epoch {epoch} must be whole numbers from 0 to 2**63 - 1")
    draws_N = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_clips)
    return np.argsort(draws_N, kind="stable").astype(np.int64, copy=False)


def num_steps(num_clips: int, batch_size: int) -> int:
    """Global batches in an epoch; the last may be short."""
    assert num_clips >= 0, num_clips
    assert batch_size >= 1, batch_size
    return -(-num_clips // batch_size)


def batch_slice(
    order: Int64[np.ndarray, " N"], batch_size: int, step: int, rank: int, world: int, num_ranks: int = 1
) -> Int64[np.ndarray, " B"]:
    """Rank's contiguous part of global batch `step`, which is order[step·G : (step+1)·G], G = `batch_size`.

    Parts differ by at most one clip; of the last, short batch a rank may have none. With `num_ranks` the part of so
    many ranks, from `rank` on.

    >>> [batch_slice(np.arange(10), 4, 2, rank, 3).tolist() for rank in range(3)]
    [[], [8], [9]]
    """
    assert 0 <= rank < rank + num_ranks <= world, (rank, num_ranks, world)
    assert 0 <= step < num_steps(len(order), batch_size), step
    batch = order[step * batch_size : (step + 1) * batch_size]
    return batch[len(batch) * rank // world : len(batch) * (rank + num_ranks) // world]
