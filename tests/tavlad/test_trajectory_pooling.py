"""Maps pooled along trajectories, one point after the other."""

import numpy as np
import torch

from tavlad.trajectory_pooling import normalised_maps, pool_along


def test_maps_are_over_their_highest_value_in_the_clip_and_over_their_highest_channel() -> None:
    maps_TDHW = torch.rand(2, 3, 2, 2, dtype=torch.float64)
    maps_TDHW[:, 1] = 0  # a channel that never speaks
    maps_TDHW[0, :, 0, 0] = 0  # a place where none does
    over_clip, over_channels = normalised_maps(maps_TDHW)
    for t, d, y, x in np.ndindex(2, 3, 2, 2):
        value = float(maps_TDHW[t, d, y, x])
        of_channel = max(float(maps_TDHW[:, d].max()), 1e-6)
        of_place = max(float(maps_TDHW[t, :, y, x].max()), 1e-6)
        assert np.isclose(float(over_clip[t, d, y, x]), value / of_channel)
        assert np.isclose(float(over_channels[t, d, y, x]), value / of_place)


def test_descriptor_is_the_sum_of_the_map_at_the_trajectorys_places() -> None:
    generator = np.random.default_rng(0)
    maps_TDHW = torch.rand(4, 5, 3, 2)
    tracks_PL3 = np.concatenate(
        [generator.integers(0, 4, (6, 3, 1)), generator.uniform(0, 1, (6, 3, 2))], axis=2
    ).astype(np.float32)
    expected = np.zeros((6, 5))
    for p in range(6):
        for t, y, x in tracks_PL3[p]:
            expected[p] += maps_TDHW[int(t), :, int(y * 3), int(x * 2)].numpy()
    np.testing.assert_allclose(pool_along(maps_TDHW, tracks_PL3), expected, rtol=1e-5)
