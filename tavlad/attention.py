"""Top-down attention: the class activation map of each frame's winning ImageNet class (Eq. 4, 5)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


def class_activation(features_BTND: Float[Tensor, "B T N D"], classifier: nn.Linear) -> Float[Tensor, "B T N"]:
    """`M_c(i) = sum_l w_c,l f_l(i)` for the winning class `c` of each frame (Eq. 4); raw, without the bias.

    `features_BTND` is the conv map after its last ReLU. The winner is the argmax of the trunk's own classifier on the
    average over places; gradients reach `classifier.weight` through the map, none flows through the argmax.
    """
    weight_CD = classifier.weight
    with torch.autocast(features_BTND.device.type, enabled=False):
        features_BTND = features_BTND.to(weight_CD.dtype)
        with torch.no_grad():
            scores_BTC = nn.functional.linear(features_BTND.mean(dim=2), weight_CD, classifier.bias)
            winner_BT = scores_BTC.argmax(dim=-1)
        winning_BTD = nn.functional.embedding(winner_BT, weight_CD)  # its gradient is summed in a fixed order
        return torch.einsum("btnd,btd->btn", features_BTND, winning_BTD)


def attend(activation: Float[Tensor, "*places"]) -> Float[Tensor, "*places"]:
    """`m(i) = sigmoid(M_c(i))`, in [0, 1] (Eq. 5)."""
    return torch.sigmoid(activation)
