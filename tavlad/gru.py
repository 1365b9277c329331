"""The states of many GRUs with shared weights, trained quickly on a CPU.

torch.nn.GRU runs as one cuDNN call on a GPU. On a CPU it is a chain of small operators a step, each remembered by
autograd, and takes three to four times its matrix products. Here forward and backward are written out: the products of
all steps that do not depend on the state are one product, and so are the weights' gradients.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear


def gru_states(x_TSD: Float[Tensor, "T S D"], gru: nn.GRU, dtype: torch.dtype | None = None) -> Float[Tensor, "T S U"]:
    """Every hidden state of each of S sequences, from a state of zeros: what `gru` itself computes.

    Products are computed in `dtype` (default: the weights' own), states and gates in the weights' precision.
    """
    weights = (gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
    return _States.apply(x_TSD, *weights, dtype or gru.weight_ih_l0.dtype)


class _States(torch.autograd.Function):
    """r, z = σ(W x + U h + b), n = tanh(W x + b + r (U h + b')), h' = n + z (h - n): torch.nn.GRU's equations."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TSD: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        num_steps, num_sequences, _ = x_TSD.shape
        width = weight_hh.shape[1]
        x_TSD, w_ih, w_hh = x_TSD.to(dtype), weight_ih.to(dtype), weight_hh.to(dtype)
        gates_TSG = linear(x_TSD, w_ih, bias_ih.to(dtype))  # G = 3 U: r, z, n
        state_SU = weight_hh.new_zeros(num_sequences, width)
        found_TSU = weight_hh.new_empty(num_steps, num_sequences, width)
        # What backward needs, in the products' precision: the states before each step, r and z, n, and U h of n.
        states_TSU = x_TSD.new_empty(num_steps, num_sequences, width)
        rz_TSV = x_TSD.new_empty(num_steps, num_sequences, 2 * width)
        n_TSU, hidden_TSU = torch.empty_like(states_TSU), torch.empty_like(states_TSU)
        for step in range(num_steps):
            states_TSU[step] = state_SU
            hidden_SG = linear(states_TSU[step], w_hh).to(state_SU.dtype) + bias_hh
            given_SG = gates_TSG[step].to(state_SU.dtype)
            rz_SV = (given_SG[:, : 2 * width] + hidden_SG[:, : 2 * width]).sigmoid_()
            r_SU, z_SU = rz_SV.chunk(2, dim=1)
            hidden_SU = hidden_SG[:, 2 * width :]
            n_SU = torch.addcmul(given_SG[:, 2 * width :], r_SU, hidden_SU).tanh_()
            state_SU = torch.lerp(n_SU, state_SU, z_SU, out=found_TSU[step])
            rz_TSV[step], n_TSU[step], hidden_TSU[step] = rz_SV, n_SU, hidden_SU
        ctx.save_for_backward(x_TSD, w_ih, w_hh, states_TSU, rz_TSV, n_TSU, hidden_TSU)
        return found_TSU

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TSD, w_ih, w_hh, states_TSU, rz_TSV, n_TSU, hidden_TSU = ctx.saved_tensors
        num_steps, num_sequences, width = n_TSU.shape
        (d_found_TSU,) = grad_outputs
        exact = d_found_TSU.dtype
        d_state_SU = torch.zeros_like(d_found_TSU[0])
        d_given_TSG = n_TSU.new_empty(num_steps, num_sequences, 3 * width)  # of W x + b
        d_hidden_TSG = torch.empty_like(d_given_TSG)  # of U h + b': differs from the above in n, by r
        for step in reversed(range(num_steps)):
            d_state_SU = d_state_SU + d_found_TSU[step]
            r_SU, z_SU = rz_TSV[step].to(exact).chunk(2, dim=1)
            n_SU, state_SU = n_TSU[step].to(exact), states_TSU[step].to(exact)
            d_n_SU = d_state_SU * (1 - z_SU) * (1 - n_SU * n_SU)
            d_given_TSG[step, :, 2 * width :] = d_n_SU
            d_hidden_TSG[step, :, 2 * width :] = d_n_SU * r_SU
            d_given_TSG[step, :, :width] = d_n_SU * hidden_TSU[step] * r_SU * (1 - r_SU)
            d_given_TSG[step, :, width : 2 * width] = d_state_SU * (state_SU - n_SU) * z_SU * (1 - z_SU)
            d_hidden_TSG[step, :, : 2 * width] = d_given_TSG[step, :, : 2 * width]
            d_state_SU = torch.addcmul((d_hidden_TSG[step] @ w_hh).to(exact), d_state_SU, z_SU)
        d_given_MG, d_hidden_MG = d_given_TSG.flatten(0, 1), d_hidden_TSG.flatten(0, 1)
        d_x_TSD = d_given_TSG @ w_ih if ctx.needs_input_grad[0] else None
        gradients = (
            d_given_MG.T @ x_TSD.flatten(0, 1),
            d_hidden_MG.T @ states_TSU.flatten(0, 1),
            d_given_MG.sum(dim=0, dtype=exact),
            d_hidden_MG.sum(dim=0, dtype=exact),
        )
        return d_x_TSD, *(gradient.to(exact) for gradient in gradients), None
