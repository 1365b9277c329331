"""From one VLAD a frame to one a clip: the sum over time, or what K GRUs with shared weights make of it. And, without
VLAD, how much frames change."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tavlad.errors import UserError
from tavlad.gru import gru_states

_LEAST_VARIANCE = 1e-12


def sum_over_time(vlad_BTKD: Float[Tensor, "B T K D"]) -> Float[Tensor, "B K D"]:
    """ActionVLAD's aggregation (Eq. 2): blind to the order of the frames."""
    return vlad_BTKD.sum(dim=1)


def change_over_time(features_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B 2 D"]:
    """How much each feature changes in a clip: its standard deviation over the frames, and the mean size of its step
    from one frame to the next. Blind to its level, and to the direction of time. ValueError for clips of one frame."""
    if features_BTD.shape[1] < 2:
        raise UserError('model.temporal = "change" compares frames: pack clips of at least two (--num-frames)')
    # The root has no slope at 0, where features that never fire are.
    deviation_BD = (features_BTD.var(dim=1, correction=0) + _LEAST_VARIANCE).sqrt()
    step_BD = features_BTD.diff(dim=1).abs().mean(dim=1)
    return torch.stack([deviation_BD, step_BD], dim=1)


def gru_over_time(
    vlad_BTKD: Float[Tensor, "B T K D"],
    gru: nn.GRU,
    readout: Literal["last", "mean"] = "last",
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "B K U"]:
    """The last hidden state of one GRU a cluster (section 2.3), or the mean of its states over time; products in
    `dtype`, by default the weights' own.

    The K GRUs share their weights, so K joins the batch.
    """
    num_clips, num_frames, num_clusters, size = vlad_BTKD.shape
    device = vlad_BTKD.device.type
    sequences_TSD = vlad_BTKD.transpose(0, 1).reshape(num_frames, num_clips * num_clusters, size)
    # An exported graph is the plain one.
    if device == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        states_TSU = gru_states(sequences_TSD, gru, dtype, last=readout == "last")
    else:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            states_TSU = gru(sequences_TSD.transpose(0, 1))[0].transpose(0, 1)
    read_SU = states_TSU[-1] if readout == "last" else states_TSU.mean(dim=0)
    return read_SU.reshape(num_clips, num_clusters, -1)
