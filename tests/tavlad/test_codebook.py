"""The codebook: which frames it is made of, and what k-means makes of them."""

import dataclasses

import numpy as np
import pytest
import torch

from tavlad.codebook import descriptors_of, find_centres, learn_words, random_frames, sample_maps
from tavlad.config import CodebookConfig, ModelConfig
from tests.tavlad.tiny import CONFIG, TinyBatches, build_model


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


def test_words_behind_a_pca_are_those_of_the_reduced_descriptors() -> None:
    """The PCA is checked against the eigenvectors of the covariance, written out."""
    generator = np.random.default_rng(0)
    scale = np.array([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    points = (generator.standard_normal((400, 6)) * scale + 2.0).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    config = ModelConfig(descriptor_pca=2, num_clusters=3)
    words = learn_words(points, config, seed=0)
    assert words.pca is not None
    values, vectors = np.linalg.eigh(np.cov(points.T.astype(np.float64)))
    expected = vectors[:, np.argsort(values)[::-1][:2]].T
    cosines = np.abs((expected * words.pca.components_PD.numpy()).sum(axis=1))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-4)
    np.testing.assert_allclose(words.pca.mean_D.numpy(), points.mean(axis=0), atol=1e-5)

    reduced = (points - points.mean(axis=0)) @ words.pca.components_PD.numpy().T
    reduced /= np.linalg.norm(reduced, axis=1, keepdims=True)
    nearest = np.linalg.norm(reduced[:, None] - words.centres_KD.numpy()[None], axis=2).argmin(axis=1)
    means = np.stack([reduced[nearest == k].mean(axis=0) for k in range(3)])
    np.testing.assert_allclose(means, words.centres_KD.numpy(), atol=2e-2)

    with pytest.raises(ValueError, match=r"400 descriptors cannot give 401 directions: lower model\.descriptor_pca"):
        learn_words(np.ones((400, 500), dtype=np.float32), ModelConfig(descriptor_pca=401), seed=0)


def test_model_takes_words_over_and_its_checkpoint_holds_them() -> None:
    config = dataclasses.replace(CONFIG, descriptor_pca=7)
    model = build_model(config)
    found = descriptors_of(sample_maps(model, TinyBatches().epoch(0), CodebookConfig(frames=8), 0, "float32"))
    assert found.shape[1] == 512, "descriptors are sampled before the PCA"
    words = learn_words(found, config, seed=0)
    model.initialise(words)
    assert model.vlad is not None
    assert words.pca is not None
    assert torch.equal(model.vlad.centres, words.centres_KD)
    assert torch.equal(model.state_dict()["pca.components"], words.pca.components_PD)
    assert torch.equal(model.state_dict()["pca.mean"], words.pca.mean_D)
    with pytest.raises(
        ValueError, match=r"model\.descriptor_pca = 900: this trunk's descriptors have 512 numbers only"
    ):
        build_model(dataclasses.replace(CONFIG, descriptor_pca=900))
