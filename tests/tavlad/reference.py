"""The head of TA-VLAD from the trunk's maps to the logits, Eq. 1-6, in float64, one number after the other.

Written from the paper's formulas, with none of the project's code: what it lacks in speed it has in being easy to
compare with the text. Letters as everywhere: B clips, T frames, D descriptor size, N places, K clusters, U GRU width,
A actions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """All the numbers the logits depend on; `pre_BTDN` and `post_BTDN` are the last conv map around its last ReLU."""

    pre_BTDN: Array
    post_BTDN: Array
    cam_BTDN: Array
    """The map the attention looks at: `post_BTDN` again, or that of the second trunk."""
    fc_weight_CD: Array
    fc_bias_C: Array
    assign_weight_KD: Array
    assign_bias_K: Array
    centres_KD: Array
    classifier_weight: Array
    classifier_bias_A: Array
    gru_weight_ih: Array
    """(3U, D): the rows of the reset gate, the update gate and the candidate, as in torch.nn.GRU; so for the rest."""
    gru_weight_hh: Array
    gru_bias_ih: Array
    gru_bias_hh: Array

    def moved(self, name: str, direction: Array, step: float) -> "Head":
        return replace(self, **{name: getattr(self, name) + step * direction})


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What departs from the paper; the defaults do not."""

    scale: str = "sigmoid"
    temperature: float = 1.0
    readout: str = "last"
    power: float = 1.0
    pca_mean_D: Array | None = None
    pca_components_PD: Array | None = None


PAPER = Options()


def consensus_logits(head: Head) -> Array:
    """Each frame's own scores on its average-pooled map, averaged over the frames (TSN)."""
    num_clips, num_frames = head.post_BTDN.shape[:2]
    scores = np.zeros((num_clips, len(head.classifier_bias_A)))
    for b in range(num_clips):
        for t in range(num_frames):
            pooled_D = np.array([np.sum(row) / len(row) for row in head.post_BTDN[b, t]])
            scores[b] += (head.classifier_weight @ pooled_D + head.classifier_bias_A) / num_frames
    return scores


def change_logits(head: Head, power: float = 1.0) -> Array:
    """Scores of how much each average-pooled feature changes over the frames: its deviation, and its mean step."""
    scores = []
    for post_TDN in head.post_BTDN:
        pooled_TD = np.array([[np.sum(row) / len(row) for row in post_DN] for post_DN in post_TDN])
        num_frames = len(pooled_TD)
        mean_D = sum(pooled_TD) / num_frames
        deviation_D = np.sqrt(sum((pooled_D - mean_D) ** 2 for pooled_D in pooled_TD) / num_frames)
        step_D = sum(abs(pooled_TD[t] - pooled_TD[t - 1]) for t in range(1, num_frames)) / (num_frames - 1)
        video = video_descriptor(np.array([deviation_D, step_D]), power)
        scores.append(head.classifier_weight @ video + head.classifier_bias_A)
    return np.array(scores)


def logits(
    head: Head,
    attention: Literal["none", "cam", "frozen-cam"],
    temporal: Literal["sum", "gru"],
    descriptor: str,
    options: Options = PAPER,
) -> Array:
    """Scores (B, A) of the clips."""
    chosen_BTDN = head.pre_BTDN if descriptor == "pre_relu" else head.post_BTDN
    num_clips, num_frames, _, num_places = chosen_BTDN.shape
    num_actions = len(head.classifier_bias_A)
    scores_BA = np.zeros((num_clips, num_actions))
    for b in range(num_clips):
        vlad_TKD = []
        for t in range(num_frames):
            map_DN = (head.post_BTDN if attention == "cam" else head.cam_BTDN)[b, t]
            attention_N = np.ones(num_places) if attention == "none" else frame_attention(map_DN, head, options)
            vlad_TKD.append(frame_vlad(chosen_BTDN[b, t], attention_N, head, options))
        pooled = sum(vlad_TKD) if temporal == "sum" else read_states(vlad_TKD, head, options)
        video = video_descriptor(np.asarray(pooled), options.power)
        for a in range(num_actions):
            scores_BA[b, a] = np.dot(head.classifier_weight[a], video) + head.classifier_bias_A[a]
    return scores_BA


def frame_attention(map_DN: Array, head: Head, options: Options = PAPER) -> Array:
    """Eq. 4, 5, 6: the sigmoid of the winning ImageNet class's activation map, at every place; or another scale."""
    num_places = map_DN.shape[1]
    pooled_D = sum(map_DN[:, i] for i in range(num_places)) / num_places
    scores_C = [np.dot(w_D, pooled_D) + b for w_D, b in zip(head.fc_weight_CD, head.fc_bias_C, strict=True)]
    winner = scores_C.index(max(scores_C))
    raw_N = np.zeros(num_places)
    for i in range(num_places):
        raw_N[i] = sum(head.fc_weight_CD[winner, l] * map_DN[l, i] for l in range(len(map_DN)))  # noqa: E741
    return scaled(raw_N, options)


def scaled(raw_N: Array, options: Options) -> Array:
    """Weights from 0 to 1 of an activation map."""
    if options.scale == "sigmoid":
        return np.array([1 / (1 + np.exp(-value / options.temperature)) for value in raw_N])
    if options.scale == "standardised":
        deviation = np.sqrt(np.mean((raw_N - np.mean(raw_N)) ** 2))
        z_N = (raw_N - np.mean(raw_N)) / (deviation + 1e-6)
        return np.array([1 / (1 + np.exp(-z / options.temperature)) for z in z_N])
    if options.scale == "minmax":
        return (raw_N - min(raw_N)) / (max(raw_N) - min(raw_N) + 1e-6)
    exp_N = np.exp(raw_N / options.temperature)
    softmax_N = exp_N / sum(exp_N)
    return softmax_N / max(softmax_N)


def frame_vlad(map_DN: Array, attention_N: Array, head: Head, options: Options = PAPER) -> Array:
    """Eq. 1 with the memberships of Eq. 3: attention-weighted residuals from each centre, summed over the places."""
    vlad_KD = np.zeros_like(head.centres_KD)
    for i in range(map_DN.shape[1]):
        x_D = map_DN[:, i] / length(map_DN[:, i])
        if options.pca_mean_D is not None:
            assert options.pca_components_PD is not None
            x_D = np.array([np.dot(row_D, x_D - options.pca_mean_D) for row_D in options.pca_components_PD])
            x_D = x_D / length(x_D)
        for k, membership in enumerate(memberships(x_D, head)):
            vlad_KD[k] += attention_N[i] * membership * (x_D - head.centres_KD[k])
    return vlad_KD


def memberships(x_D: Array, head: Head) -> Array:
    """softmax_k(W_k · x + B_k)."""
    logit_K = np.array([np.dot(w_D, x_D) + b for w_D, b in zip(head.assign_weight_KD, head.assign_bias_K, strict=True)])
    exp_K = np.exp(logit_K - logit_K.max())
    return exp_K / exp_K.sum()


def assignment(centres_KD: Array, alpha: float) -> tuple[Array, Array]:
    """W_k = 2αc_k and B_k = -α‖c_k‖², which make the memberships softmax_k(-α‖x - c_k‖²)."""
    return 2 * alpha * centres_KD, np.array([-alpha * sum(value**2 for value in c_D) for c_D in centres_KD])


def read_states(vlad_TKD: list[Array], head: Head, options: Options) -> Array:
    """(K, U): the last state, or the mean of the states after each frame."""
    if options.readout == "last":
        return last_states(vlad_TKD, head)
    after_each = [last_states(vlad_TKD[: t + 1], head) for t in range(len(vlad_TKD))]
    return sum(after_each) / len(after_each)


def last_states(vlad_TKD: list[Array], head: Head) -> Array:
    """(K, U): one GRU, the same for every cluster, run over the frames from a zero state (Chung et al. 2014, in the
    form of torch.nn.GRU: the reset gate acts on the recurrent term after its bias)."""
    width = head.gru_weight_hh.shape[1]
    reset, update, candidate = (slice(g * width, (g + 1) * width) for g in range(3))
    states = []
    for k in range(len(head.centres_KD)):
        h_U = np.zeros(width)
        for vlad_KD in vlad_TKD:
            of_input = head.gru_weight_ih @ vlad_KD[k] + head.gru_bias_ih
            of_state = head.gru_weight_hh @ h_U + head.gru_bias_hh
            r_U = 1 / (1 + np.exp(-(of_input[reset] + of_state[reset])))
            z_U = 1 / (1 + np.exp(-(of_input[update] + of_state[update])))
            n_U = np.tanh(of_input[candidate] + r_U * of_state[candidate])
            h_U = (1 - z_U) * n_U + z_U * h_U
        states.append(h_U)
    return np.array(states)


def video_descriptor(pooled_KX: Array, power: float = 1.0) -> Array:
    """Each cluster's row to length one, the rows one after the other, all of it to length one."""
    flat = np.concatenate([row / length(row) for row in pooled_KX])
    flat = np.array([np.copysign(abs(value) ** power, value) for value in flat])
    return flat / length(flat)


def length(x: Array) -> float:
    """The Euclidean length, never so small that a zero vector could not be divided by it."""
    return max(float(np.sqrt(np.sum(x**2))), 1e-12)


def slope(head: Head, name: str, direction: Array, scalar: Callable[[Head], float], step: float = 1e-6) -> float:
    """The derivative of `scalar` along `direction` in the tensor `name`, by central differences."""
    return (scalar(head.moved(name, direction, step)) - scalar(head.moved(name, direction, -step))) / (2 * step)
