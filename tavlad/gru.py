"""The states of many GRUs with shared weights, trained quickly on a CPU.

torch.nn.GRU runs as one cuDNN call on a GPU. On a CPU it is a chain of small operators a step, each remembered by
autograd, and takes three to four times its matrix products. Here forward and backward are written out: the products of
all steps that do not depend on the state are one product, and so are the weights' gradients.

Most words occur in some frames of a clip only, so most of what the GRUs are given is zero. A row of zeros needs no
product. And until its first row that is not, a sequence is in the same state as any other such: these are computed
once, as one sequence without input. Both are exact.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import linear


def gru_states(x_TSD: Float[Tensor, "T S D"], gru: nn.GRU, dtype: torch.dtype | None = None) -> Float[Tensor, "T S U"]:
    """Every hidden state of each of S sequences, from a state of zeros: what `gru` itself computes.

    Products are computed in `dtype` (default: the weights' own), states and gates in the weights' precision.
    """
    weights = (gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
    return _States.apply(x_TSD, *weights, dtype or gru.weight_ih_l0.dtype)


class _Packing(NamedTuple):
    """Which rows are computed: at each step that of the sequence without input, then those of sequences that have
    begun, in the order in which they begin. The rows of all steps together are P."""

    order_S: Int64[Tensor, " S"]
    """The sequences by their first step with input."""
    num_rows: list[int]
    """Of each step."""
    given_M: Int64[Tensor, " M"]
    """Those of the P rows that have input."""
    source_M: Int64[Tensor, " M"]
    """And where it is in the flattened input."""


def _pack(is_given_TS: Bool[Tensor, "T S"], *, from_start: bool) -> _Packing:
    """`from_start`: as if every sequence began at once."""
    num_steps, num_sequences = is_given_TS.shape
    steps_T1 = torch.arange(num_steps, device=is_given_TS.device)[:, None]
    first_S = torch.where(is_given_TS, steps_T1, num_steps).amin(dim=0)
    if from_start:
        first_S = torch.zeros_like(first_S)
    order_S = first_S.argsort(stable=True)
    has_begun_TS = first_S[order_S] <= steps_T1
    # Row-major: step by step, and in a step from the first to begin to the last.
    step_R, place_R = has_begun_TS.nonzero(as_tuple=True)
    source_R = step_R * num_sequences + order_S[place_R]
    is_given_R = is_given_TS.flatten()[source_R]
    row_R = torch.arange(len(step_R), device=step_R.device) + step_R + 1  # each step has one row more, its first
    return _Packing(
        order_S=order_S,
        num_rows=(has_begun_TS.sum(dim=1) + 1).tolist(),
        given_M=row_R[is_given_R],
        source_M=source_R[is_given_R],
    )


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
        x_TSD, w_ih, w_hh, b_ih = x_TSD.to(dtype), weight_ih.to(dtype), weight_hh.to(dtype), bias_ih.to(dtype)
        # The gradient of an input tells its sequence from others in the same state: then none are computed together.
        packing = _pack(x_TSD.abs().amax(dim=-1) > 0, from_start=ctx.needs_input_grad[0])
        x_MD = x_TSD.flatten(0, 1).index_select(0, packing.source_M)
        gates_PG = x_MD.new_empty(sum(packing.num_rows), 3 * width).copy_(b_ih)  # G = 3 U: r, z, n
        gates_PG.index_copy_(0, packing.given_M, linear(x_MD, w_ih, b_ih))
        # In packing's order, after the state of a sequence without input.
        state_SU = weight_hh.new_zeros(1 + num_sequences, width)
        found_TSU = weight_hh.new_empty(num_steps, num_sequences, width)
        # What backward needs, in the products' precision: the states before each step, r and z, n, and U h of n.
        states_PU = gates_PG.new_empty(len(gates_PG), width)
        rz_PV = gates_PG.new_empty(len(gates_PG), 2 * width)
        n_PU, hidden_PU = torch.empty_like(states_PU), torch.empty_like(states_PU)
        for step, rows in enumerate(_slices(packing.num_rows)):
            num_rows = packing.num_rows[step]
            states_PU[rows] = state_SU[:num_rows]
            hidden_RG = linear(states_PU[rows], w_hh).to(state_SU.dtype) + bias_hh
            given_RG = gates_PG[rows].to(state_SU.dtype)
            rz_RV = (given_RG[:, : 2 * width] + hidden_RG[:, : 2 * width]).sigmoid_()
            r_RU, z_RU = rz_RV.chunk(2, dim=1)
            hidden_RU = hidden_RG[:, 2 * width :]
            n_RU = torch.addcmul(given_RG[:, 2 * width :], r_RU, hidden_RU).tanh_()
            torch.lerp(n_RU, state_SU[:num_rows], z_RU, out=state_SU[:num_rows])
            state_SU[num_rows:] = state_SU[0]
            found_TSU[step].index_copy_(0, packing.order_S, state_SU[1:])
            rz_PV[rows], n_PU[rows], hidden_PU[rows] = rz_RV, n_RU, hidden_RU
        ctx.packing = packing
        ctx.save_for_backward(x_MD, w_ih, w_hh, states_PU, rz_PV, n_PU, hidden_PU)
        return found_TSU

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, w_ih, w_hh, states_PU, rz_PV, n_PU, hidden_PU = ctx.saved_tensors
        packing: _Packing = ctx.packing
        (d_found_TSU,) = grad_outputs
        num_steps, num_sequences, width = d_found_TSU.shape
        exact = d_found_TSU.dtype
        d_state_SU = d_found_TSU.new_zeros(1 + num_sequences, width)
        d_given_PG = n_PU.new_empty(len(n_PU), 3 * width)  # of W x + b
        d_hidden_PG = torch.empty_like(d_given_PG)  # of U h + b': differs from the above in n, by r
        for step, rows in reversed(list(enumerate(_slices(packing.num_rows)))):
            num_rows = packing.num_rows[step]
            d_state_SU[1:] += d_found_TSU[step].index_select(0, packing.order_S)
            # Sequences that have not begun are in the state of the one without input.
            d_state_SU[0] += d_state_SU[num_rows:].sum(dim=0)
            d_state_SU[num_rows:] = 0
            d_state_RU = d_state_SU[:num_rows]
            r_RU, z_RU = rz_PV[rows].to(exact).chunk(2, dim=1)
            n_RU, state_RU = n_PU[rows].to(exact), states_PU[rows].to(exact)
            d_n_RU = d_state_RU * (1 - z_RU) * (1 - n_RU * n_RU)
            d_given_RG, d_hidden_RG = d_given_PG[rows], d_hidden_PG[rows]
            d_given_RG[:, 2 * width :] = d_n_RU
            d_hidden_RG[:, 2 * width :] = d_n_RU * r_RU
            d_given_RG[:, :width] = d_n_RU * hidden_PU[rows] * r_RU * (1 - r_RU)
            d_given_RG[:, width : 2 * width] = d_state_RU * (state_RU - n_RU) * z_RU * (1 - z_RU)
            d_hidden_RG[:, : 2 * width] = d_given_RG[:, : 2 * width]
            d_state_SU[:num_rows] = torch.addcmul((d_hidden_RG @ w_hh).to(exact), d_state_RU, z_RU)
        d_x_TSD = None
        if ctx.needs_input_grad[0]:  # then every step has a row for each sequence, in their own order
            d_x_TSD = d_given_PG.unflatten(0, (num_steps, 1 + num_sequences))[:, 1:] @ w_ih
        gradients = (
            d_given_PG.index_select(0, packing.given_M).T @ x_MD,
            d_hidden_PG.T @ states_PU,
            # Summed exactly and rounded at the end; asked for the exact type, it would copy all of it first.
            d_given_PG.sum(dim=0),
            d_hidden_PG.sum(dim=0),
        )
        return d_x_TSD, *(gradient.to(exact) for gradient in gradients), None


def _slices(num_rows: list[int]) -> list[slice]:
    """The rows of each step among those of all."""
    ends = torch.tensor(num_rows).cumsum(0).tolist()
    return [slice(end - num, end) for end, num in zip(ends, num_rows, strict=True)]
