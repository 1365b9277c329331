"""The other systems of the paper's Table 2 that are one ImageNet trunk over frames: no VLAD, frames scored one by one.

| `temporal` | what it is | what differs from the source |
|---|---|---|
| `consensus` | TSN (Wang et al. 2016): the average of all frames' logits, in training too | T frames, not 3 or 25 segments |
| `single-frame` | two-stream's spatial stream (Simonyan & Zisserman 2014): one random frame of a clip in training, the average of the frames' probabilities in testing | one crop in testing, not ten |
| `lstm-attention` | an LSTM that looks at the places of each frame by soft attention (Sharma et al. 2015) | places are scored from what they show and the state (Bahdanau's form), there from the state alone; one layer, there three |
"""  # noqa: E501

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SoftAttentionLstm(nn.Module):
    """An LSTM over frames whose input is an average of the frame's places, weighted by what the state asks for."""

    def __init__(self, feature_size: int, width: int) -> None:
        super().__init__()
        self.begin = nn.Linear(feature_size, 2 * width)
        self.of_place = nn.Linear(feature_size, width)
        self.of_state = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        self.cell = nn.LSTMCell(feature_size, width)

    def forward(self, places_BTND: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T U"]:
        """The state after each frame; the first state is made of the average over all places and frames."""
        hidden_BU, cell_BU = self.begin(places_BTND.mean(dim=(1, 2))).tanh().chunk(2, dim=1)
        keys_BTNU = self.of_place(places_BTND)
        states: list[Tensor] = []
        for frame in range(places_BTND.shape[1]):
            weights_BN = self.attend(keys_BTNU[:, frame], hidden_BU)
            seen_BD = torch.einsum("bn,bnd->bd", weights_BN, places_BTND[:, frame])
            hidden_BU, cell_BU = self.cell(seen_BD, (hidden_BU, cell_BU))
            states.append(hidden_BU)
        return torch.stack(states, dim=1)

    def attend(self, keys_BNU: Float[Tensor, "B N U"], hidden_BU: Float[Tensor, "B U"]) -> Float[Tensor, "B N"]:
        """Weights of a frame's places, which sum to 1."""
        scores_BN1 = self.score(torch.tanh(keys_BNU + self.of_state(hidden_BU)[:, None]))
        return scores_BN1.squeeze(-1).softmax(dim=1)


def mean_of_probabilities(logits_BTA: Float[Tensor, "B T A"]) -> Float[Tensor, "B A"]:
    """Log of the average of the frames' probabilities: its softmax is that average."""
    return logits_BTA.log_softmax(dim=-1).logsumexp(dim=1) - torch.tensor(float(logits_BTA.shape[1])).log()
