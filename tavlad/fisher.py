"""Fisher vectors of a clip's local descriptors, and the linear SVM on them (Sánchez et al. 2013, "Image Classification
with the Fisher Vector"; Perronnin et al. 2010 for the signed square root and the length of one).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64

from tavlad.errors import UserError

_FLOOR = 1e-4  # added to the variances, of descriptors scaled to a mean square of 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """A PCA, and a Gaussian mixture with diagonal variances of what it leaves."""

    mean_D: Float32[np.ndarray, " D"]
    components_PD: Float32[np.ndarray, "P D"]
    weights_K: Float32[np.ndarray, " K"]
    centres_KP: Float32[np.ndarray, "K P"]
    variances_KP: Float32[np.ndarray, "K P"]


def learn_mixture(x_ND: Float32[np.ndarray, "N D"], size: int, num_components: int, seed: int) -> Mixture:
    """The PCA to `size` numbers, scaled to a mean square of 1, and K Gaussians by expectation maximisation.

    ValueError if there are fewer descriptors than numbers or Gaussians.
    """
    from sklearn.decomposition import PCA  # two seconds, only where it is needed
    from sklearn.mixture import GaussianMixture

    if len(x_ND) < max(size, num_components):
        raise UserError(
            f"{len(x_ND)} descriptors are too few for {num_components} Gaussians of {size} numbers: lower "
            "model.num_clusters and model.descriptor_pca"
        )
    pca: Any = PCA(size, random_state=seed).fit(x_ND)
    scale = np.sqrt(np.mean(pca.explained_variance_)) or 1.0
    mean_D, components_PD = _single(pca.mean_), _single(pca.components_ / scale)
    mixture: Any = GaussianMixture(num_components, covariance_type="diag", reg_covar=_FLOOR, random_state=seed)
    mixture.fit((x_ND - mean_D) @ components_PD.T)
    return Mixture(
        mean_D=mean_D,
        components_PD=components_PD,
        weights_K=_single(mixture.weights_),
        centres_KP=_single(mixture.means_),
        variances_KP=_single(mixture.covariances_),
    )


def _single(values: Float[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    return values.astype(np.float32)


def fisher_vector(x_ND: Float32[np.ndarray, "N D"], mixture: Mixture) -> Float32[np.ndarray, " X"]:
    """2 K P numbers: the gradients of the log likelihood by centres and deviations, scaled by the inverse root of their
    Fisher information (Sánchez, Eq. 17, 18; those by the weights left out), then their signed square root, of length
    one."""
    y_NP = (x_ND - mixture.mean_D) @ mixture.components_PD.T
    centres_KP, variances_KP, weights_K1 = mixture.centres_KP, mixture.variances_KP, mixture.weights_K[:, None]
    # log w_k N(y; centre, variance) up to what all k share, its square multiplied out.
    log_NK = -0.5 * (y_NP**2 @ (1 / variances_KP).T) + y_NP @ (centres_KP / variances_KP).T
    log_NK += np.log(mixture.weights_K) - 0.5 * (np.log(variances_KP) + centres_KP**2 / variances_KP).sum(axis=1)
    memberships_NK = np.exp(log_NK - log_NK.max(axis=1, keepdims=True))
    memberships_NK /= memberships_NK.sum(axis=1, keepdims=True)
    count_K1 = memberships_NK.sum(axis=0)[:, None]
    sum_KP, squares_KP = memberships_NK.T @ y_NP, memberships_NK.T @ y_NP**2
    by_centre_KP = (sum_KP - count_K1 * centres_KP) / np.sqrt(weights_K1 * variances_KP)
    spread_KP = squares_KP - 2 * centres_KP * sum_KP + (centres_KP**2 - variances_KP) * count_K1
    by_deviation_KP = spread_KP / (np.sqrt(2 * weights_K1) * variances_KP)
    vector = np.concatenate([by_centre_KP.ravel(), by_deviation_KP.ravel()]) / len(x_ND)
    vector = np.sign(vector) * np.sqrt(np.abs(vector))
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def classify(
    train_BX: Float32[np.ndarray, "B X"],
    labels_B: Int64[np.ndarray, " B"],
    test_CX: Float32[np.ndarray, "C X"],
    num_actions: int,
    cost: float,
    seed: int,
) -> Float32[np.ndarray, "C A"]:
    """Scores of the test clips by one linear SVM an action against the others; actions without clips score lowest."""
    from sklearn.svm import LinearSVC

    svm = LinearSVC(C=cost, random_state=seed, max_iter=10_000).fit(train_BX, labels_B)
    values = svm.decision_function(test_CX)
    if values.ndim == 1:  # of two actions it gives the second's alone
        values = np.stack([-values, values], axis=1)
    scores_CA = np.full((len(test_CX), num_actions), values.min() - 1, dtype=np.float32)
    scores_CA[:, svm.classes_] = values
    return scores_CA
