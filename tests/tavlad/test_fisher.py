"""Fisher vectors against the gradients they are named after, written out; the SVM on what it is asked to tell apart."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tavlad.fisher import Mixture, classify, fisher_vector, learn_mixture

Array = NDArray[np.float64]


def _mixture(generator: np.random.Generator, num_components: int = 3, size: int = 4, full: int = 6) -> Mixture:
    weights = generator.uniform(0.5, 1.5, num_components)
    return Mixture(
        mean_D=generator.standard_normal(full).astype(np.float32),
        components_PD=generator.standard_normal((size, full)).astype(np.float32),
        weights_K=(weights / weights.sum()).astype(np.float32),
        centres_KP=generator.standard_normal((num_components, size)).astype(np.float32),
        variances_KP=generator.uniform(0.5, 2.0, (num_components, size)).astype(np.float32),
    )


def _log_likelihood(y_NP: Array, weights_K: Array, centres_KP: Array, deviations_KP: Array) -> float:
    """Of all descriptors under the mixture, one after the other."""
    total = 0.0
    for y_P in y_NP:
        likelihood = 0.0
        for weight, centre_P, deviation_P in zip(weights_K, centres_KP, deviations_KP, strict=True):
            density = np.prod(np.exp(-0.5 * ((y_P - centre_P) / deviation_P) ** 2) / (deviation_P * np.sqrt(2 * np.pi)))
            likelihood += weight * density
        total += np.log(likelihood)
    return total


def test_fisher_vector_is_the_scaled_slope_of_the_log_likelihood() -> None:
    generator = np.random.default_rng(0)
    mixture, x_ND = _mixture(generator), generator.standard_normal((5, 6)).astype(np.float32)
    y_NP = ((x_ND - mixture.mean_D) @ mixture.components_PD.T).astype(np.float64)
    weights_K, centres_KP = mixture.weights_K.astype(np.float64), mixture.centres_KP.astype(np.float64)
    deviations_KP = np.sqrt(mixture.variances_KP.astype(np.float64))
    slopes = np.zeros((2, *centres_KP.shape))
    step = 1e-6
    for k, p in np.ndindex(*centres_KP.shape):
        move = np.zeros_like(centres_KP)
        move[k, p] = step
        for which, (ahead, behind) in enumerate(
            [
                ((centres_KP + move, deviations_KP), (centres_KP - move, deviations_KP)),
                ((centres_KP, deviations_KP + move), (centres_KP, deviations_KP - move)),
            ]
        ):
            difference = _log_likelihood(y_NP, weights_K, *ahead) - _log_likelihood(y_NP, weights_K, *behind)
            slopes[which, k, p] = difference / (2 * step)
    # The Fisher information of a centre is N w / s^2, of a deviation 2 N w / s^2 (Sanchez 2013); a factor that all
    # share goes with the length of one.
    scaled = slopes * deviations_KP / np.sqrt(weights_K)[:, None]
    scaled[1] /= np.sqrt(2)
    expected = np.sign(scaled.ravel()) * np.sqrt(np.abs(scaled.ravel()))
    np.testing.assert_allclose(fisher_vector(x_ND, mixture), expected / np.linalg.norm(expected), rtol=2e-3, atol=2e-4)


def test_mixture_finds_the_gaussians_it_was_drawn_from() -> None:
    generator = np.random.default_rng(1)
    centres = np.array([[4.0, 0, 0], [-4.0, 0, 0]])
    x_ND = np.concatenate([centre + 0.3 * generator.standard_normal((300, 3)) for centre in centres]).astype(np.float32)
    mixture = learn_mixture(x_ND, size=2, num_components=2, seed=0)
    assert mixture.components_PD.shape == (2, 3)
    np.testing.assert_allclose(mixture.weights_K, [0.5, 0.5], atol=0.01)
    y_NP = (x_ND - mixture.mean_D) @ mixture.components_PD.T
    assert np.mean(y_NP**2) == pytest.approx(1.0, rel=0.02)
    assert np.abs(np.sort(mixture.centres_KP[:, 0])) == pytest.approx(np.sqrt([2, 2]), rel=0.05)
    with pytest.raises(ValueError, match=r"600 descriptors are too few for 601 Gaussians"):
        learn_mixture(x_ND, size=2, num_components=601, seed=0)


@pytest.mark.parametrize("actions", [(0, 2), (0, 1, 3)])
def test_svm_scores_every_action_and_those_never_seen_lowest(actions: tuple[int, ...]) -> None:
    generator = np.random.default_rng(2)
    labels_B = np.repeat(np.array(actions), 20)
    places = generator.standard_normal((4, 8))
    x_BX = (places[labels_B] + 0.1 * generator.standard_normal((len(labels_B), 8))).astype(np.float32)
    scores_CA = classify(x_BX, labels_B, x_BX, 4, cost=100.0, seed=0)
    assert scores_CA.shape == (len(labels_B), 4)
    assert (scores_CA.argmax(axis=1) == labels_B).all()
    unseen = [action for action in range(4) if action not in actions]
    assert (scores_CA[:, unseen] < scores_CA[:, list(actions)].min()).all()
