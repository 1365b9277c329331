"""The codebook: which frames it is made of, and what k-means makes of them."""

import numpy as np
import pytest
import torch

from tavlad.codebook import descriptors_of, find_centres, random_frames, sample_maps
from tavlad.config import CodebookConfig
from tests.tavlad.tiny import TinyBatches, build_model


def test_descriptors_are_those_of_the_chosen_frames_of_each_clip() -> None:
    model = build_model().eval()
    config = CodebookConfig(frames_per_video=2)
    found = descriptors_of(sample_maps(model, TinyBatches().epoch(0), config, 3, "float32"))
    expected = [
        model.encode(frames[None]).descriptors_BTND[0, random_frames(3, key, 3, 2)].flatten(0, 1)
        for batch in TinyBatches().epoch(0)
        for frames, key in zip(batch.frames_BTCHW, batch.keys, strict=True)
    ]
    np.testing.assert_allclose(found, torch.cat(expected).detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)


def test_no_more_frames_are_taken_than_asked_for() -> None:
    config = CodebookConfig(frames=5, frames_per_video=2)
    found = descriptors_of(sample_maps(build_model(), TinyBatches().epoch(0), config, 0, "float32"))
    assert len(found) == 5 * 1  # one place a frame of 32 pixels


def test_frames_are_a_function_of_seed_and_key() -> None:
    draws = {tuple(random_frames(seed, key, 25, 3)) for seed in range(5) for key in "abcde"}
    assert len(draws) > 20
    assert random_frames(1, "a", 25, 3) == random_frames(1, "a", 25, 3)
    assert random_frames(1, "a", 2, 3) == [0, 1]


def test_centres_of_separate_groups_are_their_means() -> None:
    generator = np.random.default_rng(0)
    means = np.eye(3, 8, dtype=np.float32) * 10
    points = np.concatenate([mean + generator.normal(0, 0.01, (50, 8)) for mean in means]).astype(np.float32)
    centres = find_centres(points, 3, seed=0).numpy()
    assert np.abs(np.sort(centres.argmax(axis=1)) - np.arange(3)).max() == 0
    np.testing.assert_allclose(centres[centres.argmax(axis=1).argsort()], means, atol=0.01)


def test_more_clusters_than_descriptors_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"3 descriptors cannot make 4 clusters: lower model\.num_clusters"):
        find_centres(np.zeros((3, 8), dtype=np.float32), 4, seed=0)
