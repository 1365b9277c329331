"""The VLAD layer: soft assignment of descriptors to clusters and the sums of their residuals (Eq. 1-3); and the PCA
that descriptors may go through before it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tavlad.errors import UserError
from tavlad.residual_sums import residual_sums


@dataclass(frozen=True, kw_only=True, slots=True)
class Pca:
    """A linear reduction of descriptors."""

    mean_D: Float[Tensor, " D"]
    components_PD: Float[Tensor, "P D"]
    """Orthonormal rows, the largest variance first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualWords:
    """What is learned from descriptors of the training part before any training."""

    centres_KD: Float[Tensor, "K D"]
    """Of the descriptors as VLAD gets them: behind the PCA if there is one."""
    pca: Pca | None = None


class DescriptorPca(nn.Module):
    """Descriptors less their mean, projected on P directions and brought to unit length again. Not trained."""

    mean: Float[Tensor, " D"]
    components: Float[Tensor, "P D"]

    def __init__(self, descriptor_size: int, size: int) -> None:
        super().__init__()
        if size > descriptor_size:
            raise UserError(
                f"model.descriptor_pca = {size}: this trunk's descriptors have {descriptor_size} numbers only"
            )
        self.register_buffer("mean", torch.zeros(descriptor_size))
        self.register_buffer("components", torch.zeros(size, descriptor_size))

    def forward(self, x_BTND: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N P"]:
        with torch.autocast(x_BTND.device.type, enabled=False):
            reduced = nn.functional.linear(x_BTND.to(self.mean.dtype) - self.mean, self.components)
            return nn.functional.normalize(reduced, dim=-1, eps=1e-12)


class Vlad(nn.Module):
    """K clusters over descriptors of size D. Assignment weights, biases and centres are three separate parameters.

    Computed in the parameters' own precision even under autocast: assignment logits reach thousands, and bf16 or tf32
    would change which cluster wins.
    """

    def __init__(self, num_clusters: int, descriptor_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_clusters, descriptor_size))
        self.bias = nn.Parameter(torch.zeros(num_clusters))
        self.centres = nn.Parameter(torch.zeros(num_clusters, descriptor_size))

    @torch.no_grad()
    def initialise(self, centres_KD: Float[Tensor, "K D"], alpha: float) -> None:
        """`W_k = 2 alpha c_k`, `B_k = -alpha |c_k|^2`: near-hard assignment to the nearest centre for a large alpha."""
        if centres_KD.shape != self.centres.shape:
            raise ValueError(
                f"a codebook of {tuple(centres_KD.shape)} (clusters, descriptor size) does not fit a model of "
                f"{tuple(self.centres.shape)}: make one for this configuration with `tavlad codebook`"
            )
        self.centres.copy_(centres_KD)
        self.weight.copy_(2 * alpha * centres_KD)
        self.bias.copy_(-alpha * centres_KD.square().sum(dim=1))

    def assign(self, x_BTND: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N K"]:
        """`softmax_k(W_k x + B_k)`: how much each descriptor belongs to each cluster."""
        return nn.functional.linear(x_BTND, self.weight, self.bias).softmax(dim=-1)

    def forward(
        self,
        x_BTND: Float[Tensor, "B T N D"],
        attention_BTN: Float[Tensor, "B T N"] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "B T K D"]:
        """`V(k) = sum_i a_k(x_i) (x_i - c_k)` for each frame, `a` weighted by the attention (Eq. 1, 3).

        Written as `A^T x - (sum_i a) c`, so that no tensor of size B T N K D exists. Rounded to `dtype` (default: the
        parameters' own) at the very end. In memory the frames come first, as the GRU takes them.
        """
        with torch.autocast(x_BTND.device.type, enabled=False):
            x_BTND = x_BTND.to(self.weight.dtype)
            if attention_BTN is not None:
                attention_BTN = attention_BTN.to(self.weight.dtype)
            dtype = dtype or self.weight.dtype
            if torch.compiler.is_compiling():  # which fuses by itself, and exports no loop over clips
                return self._plain(x_BTND, attention_BTN).to(dtype)
            return residual_sums(x_BTND, attention_BTN, self.weight, self.bias, self.centres, dtype)

    def _plain(self, x_BTND: Tensor, attention_BTN: Tensor | None) -> Tensor:
        assign_BTNK = self.assign(x_BTND)
        if attention_BTN is not None:
            assign_BTNK = assign_BTNK * attention_BTN[..., None]
        weighted_BTKD = torch.einsum("btnk,btnd->btkd", assign_BTNK, x_BTND)
        return weighted_BTKD - assign_BTNK.sum(dim=2)[..., None] * self.centres
