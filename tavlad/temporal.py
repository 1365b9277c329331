"""From one VLAD a frame to one a clip: the sum over time, or what K GRUs with shared weights make of it."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tavlad.gru import gru_states


def sum_over_time(vlad_BTKD: Float[Tensor, "B T K D"]) -> Float[Tensor, "B K D"]:
    """ActionVLAD's aggregation (Eq. 2): blind to the order of the frames."""
    return vlad_BTKD.sum(dim=1)


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
