"""From one VLAD a frame to one a clip: the sum over time, or what K GRUs with shared weights make of it."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn


def sum_over_time(vlad_BTKD: Float[Tensor, "B T K D"]) -> Float[Tensor, "B K D"]:
    """ActionVLAD's aggregation (Eq. 2): blind to the order of the frames."""
    return vlad_BTKD.sum(dim=1)


def gru_states(
    vlad_BTKD: Float[Tensor, "B T K D"], gru: nn.GRU, readout: Literal["last", "mean"] = "last"
) -> Float[Tensor, "B K U"]:
    """The last hidden state of one GRU a cluster (section 2.3), or the mean of its states over time.

    The K GRUs share their weights, so K joins the batch.
    """
    num_clips, num_frames, num_clusters, size = vlad_BTKD.shape
    sequences = vlad_BTKD.transpose(1, 2).reshape(num_clips * num_clusters, num_frames, size)
    states, last = gru(sequences)
    read = last[0] if readout == "last" else states.mean(dim=1)
    return read.reshape(num_clips, num_clusters, -1)
