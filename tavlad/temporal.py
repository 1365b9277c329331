"""From one VLAD a frame to one a clip: the sum over time, or the last states of K GRUs with shared weights."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tavlad.gru import last_state


def sum_over_time(vlad_BTKD: Float[Tensor, "B T K D"]) -> Float[Tensor, "B K D"]:
    """ActionVLAD's aggregation (Eq. 2): blind to the order of the frames."""
    return vlad_BTKD.sum(dim=1)


def last_states(
    vlad_BTKD: Float[Tensor, "B T K D"], gru: nn.GRU, dtype: torch.dtype | None = None
) -> Float[Tensor, "B K U"]:
    """The last hidden state of one GRU a cluster (section 2.3); products in `dtype`, by default the weights' own.

    The K GRUs share their weights, so K joins the batch.
    """
    num_clips, num_frames, num_clusters, size = vlad_BTKD.shape
    device = vlad_BTKD.device.type
    if device == "cpu" and torch.is_grad_enabled():
        sequences_TSD = vlad_BTKD.transpose(0, 1).reshape(num_frames, num_clips * num_clusters, size)
        last_SU = last_state(sequences_TSD, gru, dtype)
    else:
        sequences_STD = vlad_BTKD.transpose(1, 2).reshape(num_clips * num_clusters, num_frames, size)
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            last_SU = gru(sequences_STD)[1][0]
    return last_SU.reshape(num_clips, num_clusters, -1)
