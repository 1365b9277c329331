"""Top-down attention: the class activation map of each frame's winning ImageNet class (Eq. 4, 5)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tavlad.trunk import image_scores

Scale = Literal["sigmoid", "standardised", "minmax", "softmax"]
_EPS = 1e-6


def class_activation(features_BTND: Float[Tensor, "B T N D"], classifier: nn.Linear) -> Float[Tensor, "B T N"]:
    """`M_c(i) = sum_l w_c,l f_l(i)` for the winning class `c` of each frame (Eq. 4); raw, without the bias.

    `features_BTND` is the conv map after its last ReLU. The winner is the argmax of the trunk's own classifier on the
    average over places; gradients reach `classifier.weight` through the map, none flows through the argmax.
    """
    weight_CD = classifier.weight
    with torch.autocast(features_BTND.device.type, enabled=False):
        features_BTND = features_BTND.to(weight_CD.dtype)
        with torch.no_grad():
            winner_BT = image_scores(features_BTND, classifier).argmax(dim=-1)
        winning_BTD = nn.functional.embedding(winner_BT, weight_CD)  # its gradient is summed in a fixed order
        return torch.einsum("btnd,btd->btn", features_BTND, winning_BTD)


def attention_weights(
    activation_BTN: Float[Tensor, "B T N"], scale: Scale, temperature: float
) -> Float[Tensor, "B T N"]:
    """From activation maps to weights in [0, 1]; `sigmoid` with temperature 1 is Eq. 5.

    A raw map is nearly always positive on real clips, where its sigmoid weighs all places about alike; the others are
    relative to the frame's own places. A frame whose map is the same everywhere gets 0.5 everywhere from
    `standardised`, 1 from `softmax` and 0 from `minmax`.
    """
    if scale == "sigmoid":
        return torch.sigmoid(activation_BTN / temperature)
    if scale == "standardised":
        mean, std = activation_BTN.mean(dim=-1, keepdim=True), activation_BTN.std(dim=-1, correction=0, keepdim=True)
        return torch.sigmoid((activation_BTN - mean) / (std + _EPS) / temperature)
    highest = activation_BTN.amax(dim=-1, keepdim=True)
    if scale == "softmax":
        return torch.exp((activation_BTN - highest) / temperature)  # softmax / its largest value
    lowest = activation_BTN.amin(dim=-1, keepdim=True)
    return (activation_BTN - lowest) / (highest - lowest + _EPS)
