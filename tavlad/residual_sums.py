"""VLAD's sums of residuals with their gradients, a few clips at a time.

Autograd would pass over several tensors of all clips at once. Here the passes of one clip (3 MB for the paper's sizes)
stay in the processor's cache, and beside what was given only the assignment is kept: an eighth of the descriptors'
memory, where computing it again would take a sixth of backward's products.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_CLIPS_PER_GPU_PASS = 32
_LEAST = 1e-20
"""A smaller share of a descriptor counts as none. At the paper's sharpness most shares are such, and below 1e-38 some
processors take a hundred times as long for each product (docs/LOG.md, 2026-11-25)."""


def residual_sums(
    x_BTND: Float[Tensor, "B T N D"],
    attention_BTN: Float[Tensor, "B T N"] | None,
    weight_KD: Float[Tensor, "K D"],
    bias_K: Float[Tensor, " K"],
    centres_KD: Float[Tensor, "K D"],
    dtype: torch.dtype,
) -> Float[Tensor, "B T K D"]:
    """`sum_i m_i softmax_k(W x_i + b) (x_i - c_k)` of each frame, in the parameters' precision, rounded to `dtype`.

    In memory the frames come first.
    """
    return _ResidualSums.apply(x_BTND, attention_BTN, weight_KD, bias_K, centres_KD, dtype)


class _ResidualSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTND: Tensor,
        attention_BTN: Tensor | None,
        weight_KD: Tensor,
        bias_K: Tensor,
        centres_KD: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        num_clips, num_frames, num_places = x_BTND.shape[:3]
        assign_BTNK = x_BTND.new_empty(num_clips, num_frames, num_places, len(centres_KD))
        sums_TBKD = x_BTND.new_empty(num_frames, num_clips, *centres_KD.shape, dtype=dtype)
        for clips in _passes(x_BTND):
            x_FND = x_BTND[clips].flatten(0, 1)
            weighted_FNK = assign_BTNK[clips].flatten(0, 1)
            logits_XK = torch.addmm(bias_K, x_FND.flatten(0, 1), weight_KD.T)
            torch.softmax(logits_XK, dim=-1, out=weighted_FNK.flatten(0, 1))
            torch.threshold_(weighted_FNK, _LEAST, 0.0)
            if attention_BTN is not None:
                weighted_FNK = weighted_FNK * attention_BTN[clips].flatten(0, 1)[..., None]
            place_BTKD = sums_TBKD[:, clips].transpose(0, 1)
            is_exact = dtype == x_BTND.dtype and len(place_BTKD) == 1
            sums_FKD = place_BTKD[0] if is_exact else x_FND.new_empty(len(x_FND), *centres_KD.shape)
            torch.bmm(weighted_FNK.transpose(1, 2), x_FND, out=sums_FKD)
            sums_FKD.addcmul_(weighted_FNK.sum(dim=1)[..., None], centres_KD, value=-1)
            if not is_exact:
                place_BTKD.copy_(sums_FKD.unflatten(0, (-1, num_frames)))
        ctx.save_for_backward(x_BTND, attention_BTN, weight_KD, centres_KD, assign_BTNK)
        return sums_TBKD.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            of_x, of_attention = ctx.needs_input_grad[:2]
            x_BTND, attention_BTN, *layer = ctx.saved_tensors
            return (
                *_backward(x_BTND, attention_BTN, *layer, *grad_outputs, of_x=of_x, of_attention=of_attention),
                None,
            )


def _backward(
    x_BTND: Tensor,
    attention_BTN: Tensor | None,
    weight_KD: Tensor,
    centres_KD: Tensor,
    assign_BTNK: Tensor,
    d_sums_BTKD: Tensor,
    *,
    of_x: bool,
    of_attention: bool,
) -> tuple[Tensor | None, ...]:
    d_x_BTND = torch.empty_like(x_BTND, memory_format=torch.contiguous_format) if of_x else None
    d_attention_BTN = None if attention_BTN is None or not of_attention else torch.empty_like(attention_BTN)
    d_weight_KD, d_centres_KD = torch.zeros_like(weight_KD), torch.zeros_like(centres_KD)
    d_bias_K = weight_KD.new_zeros(len(weight_KD))
    for clips in _passes(x_BTND):
        x_FND = x_BTND[clips].flatten(0, 1)
        x_XD = x_FND.flatten(0, 1)
        d_sums_FKD = d_sums_BTKD[clips].to(x_BTND.dtype).flatten(0, 1)
        assign_FNK = assign_BTNK[clips].flatten(0, 1)
        weighted_FNK, attention_FN1 = assign_FNK, None
        if attention_BTN is not None:
            attention_FN1 = attention_BTN[clips].flatten(0, 1)[..., None]
            weighted_FNK = assign_FNK * attention_FN1
        d_sums_KFD = d_sums_FKD.transpose(0, 1)
        d_centres_KD -= torch.bmm(weighted_FNK.sum(dim=1).T[:, None], d_sums_KFD)[:, 0]
        # A weight's gradient is its descriptor's product with that of the sum, less the centre's.
        of_centre_FK = torch.bmm(d_sums_KFD, centres_KD[..., None])[..., 0].T
        d_weighted_FNK = torch.baddbmm(of_centre_FK[:, None], x_FND, d_sums_FKD.transpose(1, 2), beta=-1)
        d_assign_FNK = d_weighted_FNK
        if attention_FN1 is not None:
            if d_attention_BTN is not None:
                d_attention_FN = (d_weighted_FNK * assign_FNK).sum(dim=2)
                d_attention_BTN[clips] = d_attention_FN.view_as(d_attention_BTN[clips])
            d_assign_FNK = d_weighted_FNK.mul_(attention_FN1)
        # Softmax: a (d - sum_k a d)
        d_logits_FNK = torch.ops.aten._softmax_backward_data(d_assign_FNK, assign_FNK, -1, assign_FNK.dtype)
        d_logits_XK = d_logits_FNK.flatten(0, 1)
        d_weight_KD.addmm_(d_logits_XK.T, x_XD)
        d_bias_K += d_logits_XK.sum(dim=0)
        if d_x_BTND is not None:
            d_x_FND = d_x_BTND[clips].view_as(x_FND)
            torch.bmm(weighted_FNK, d_sums_FKD, out=d_x_FND)
            d_x_FND.view_as(x_XD).addmm_(d_logits_XK, weight_KD)
    return d_x_BTND, d_attention_BTN, d_weight_KD, d_bias_K, d_centres_KD


def _passes(x_BTND: Tensor) -> list[slice]:
    """Clips that are computed together: on a CPU one, so that what it needs stays in the cache."""
    size = 1 if x_BTND.device.type == "cpu" else _CLIPS_PER_GPU_PASS
    return [slice(first, first + size) for first in range(0, len(x_BTND), size)]
