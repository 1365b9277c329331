"""The states of many GRUs with shared weights, trained quickly on a CPU.

torch.nn.GRU runs as one cuDNN call on a GPU. On a CPU it is a chain of small operators a step, each remembered by
autograd, and takes three to four times its matrix products. Here forward and backward are written out, step by step, so
that what a step needs stays in the processor's cache; the weights' gradients are one product over all steps.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def gru_states(
    x_TSD: Float[Tensor, "T S D"], gru: nn.GRU, dtype: torch.dtype | None = None, *, last: bool = False
) -> Float[Tensor, "R S U"]:
    """Every hidden state of each of S sequences, from a state of zeros: what `gru` itself computes; or the last only.

    Products are computed in `dtype` (default: the weights' own), states and gates in the weights' precision.
    """
    weights = (gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
    return _States.apply(x_TSD, *weights, dtype or gru.weight_ih_l0.dtype, last)


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
        last: bool,
    ) -> Tensor:
        num_steps, num_sequences, _ = x_TSD.shape
        width = weight_hh.shape[1]
        x_TSD, w_ih, w_hh = x_TSD.to(dtype), weight_ih.to(dtype), weight_hh.to(dtype)
        w_rz, w_n = w_hh.split((2 * width, width))
        b_n = bias_hh[2 * width :].to(dtype)
        b_given = torch.cat([bias_ih[: 2 * width] + bias_hh[: 2 * width], bias_ih[2 * width :]]).to(dtype)
        state_SU = weight_hh.new_zeros(num_sequences, width)
        found_TSU = weight_hh.new_empty(1 if last else num_steps, num_sequences, width)
        # What backward needs, in the products' precision: the states before each step, r and z, n, and U h of n.
        states_TSU = x_TSD.new_empty(num_steps, num_sequences, width)
        rz_TSV = x_TSD.new_empty(num_steps, num_sequences, 2 * width)
        n_TSU, hidden_TSU = torch.empty_like(states_TSU), torch.empty_like(states_TSU)
        # Written again at each step: fresh memory would cost as much as what is computed in it.
        given_SG = x_TSD.new_empty(num_sequences, 3 * width)  # G = 3 U: r, z, n
        exact_SV, exact_SU = state_SU.new_empty(num_sequences, 2 * width), torch.empty_like(state_SU)
        exact_hidden_SU = torch.empty_like(state_SU)
        for step in range(num_steps):
            if state_SU.data_ptr() != states_TSU[step].data_ptr():
                states_TSU[step] = state_SU
            torch.addmm(b_given, x_TSD[step], w_ih.T, out=given_SG)
            if step:  # the first state is zero
                given_SG[:, : 2 * width].addmm_(states_TSU[step], w_rz.T)
            with _kept(rz_TSV[step], exact_SV) as rz_SV, _kept(n_TSU[step], exact_SU) as n_SU:
                torch.sigmoid(_exact(given_SG[:, : 2 * width], rz_SV), out=rz_SV)
                r_SU, z_SU = rz_SV.chunk(2, dim=1)
                torch.addmm(b_n, states_TSU[step], w_n.T, out=hidden_TSU[step])
                hidden_SU = _exact(hidden_TSU[step], exact_hidden_SU)
                torch.addcmul(_exact(given_SG[:, 2 * width :], n_SU), r_SU, hidden_SU, out=n_SU)
                _tanh_(n_SU, dtype)
                is_stored = last and step + 1 < num_steps and dtype == found_TSU.dtype
                found_SU = states_TSU[step + 1] if is_stored else found_TSU[0 if last else step]
                state_SU = torch.lerp(n_SU, state_SU, z_SU, out=found_SU)
        ctx.save_for_backward(x_TSD, w_ih, w_hh, states_TSU, rz_TSV, n_TSU, hidden_TSU)
        return found_TSU

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x_TSD, w_ih, w_hh, states_TSU, rz_TSV, n_TSU, hidden_TSU = ctx.saved_tensors
        num_steps, num_sequences, width = n_TSU.shape
        (d_found_RSU,) = grad_outputs
        exact = d_found_RSU.dtype
        first_read = num_steps - len(d_found_RSU)
        # Of W x + b for n, then of both for r and z, then of U h + b' for n: each weight's gates lie side by side.
        d_gates_TSX = n_TSU.new_empty(num_steps, num_sequences, 4 * width)
        d_bias_X = d_found_RSU.new_zeros(4 * width)
        d_state_SU = torch.zeros_like(d_found_RSU[0])
        exact_SX = d_found_RSU.new_empty(num_sequences, 4 * width)
        exact_SV = d_found_RSU.new_empty(num_sequences, 2 * width)
        exact_SU, d_kept_SU = torch.empty_like(d_state_SU), torch.empty_like(d_state_SU)
        for step in reversed(range(num_steps)):
            if step >= first_read:
                d_state_SU += d_found_RSU[step - first_read]
            r_SU, z_SU = _exact(rz_TSV[step], exact_SV).chunk(2, dim=1)
            n_SU = _exact(n_TSU[step], exact_SU)
            with _kept(d_gates_TSX[step], exact_SX) as d_gates_SX:
                d_n_SU, d_r_SU, d_z_SU, d_hidden_SU = d_gates_SX.chunk(4, dim=1)
                torch.mul(d_state_SU, z_SU, out=d_kept_SU)
                torch.sub(d_state_SU, d_kept_SU, out=d_n_SU)
                _tanh_backward(d_n_SU, n_SU, grad_input=d_n_SU)
                torch.mul(d_n_SU, r_SU, out=d_hidden_SU)
                torch.mul(_exact(hidden_TSU[step], d_r_SU), d_n_SU, out=d_r_SU)
                _sigmoid_backward(d_r_SU, r_SU, grad_input=d_r_SU)
                torch.sub(_exact(states_TSU[step], d_z_SU), n_SU, out=d_z_SU)
                _sigmoid_backward(d_z_SU.mul_(d_state_SU), z_SU, grad_input=d_z_SU)
                d_bias_X += d_gates_SX.sum(dim=0)
            if step:
                torch.add(d_kept_SU, d_gates_TSX[step, :, width:] @ w_hh, out=d_state_SU)
        d_given_TSG, d_hidden_TSG = d_gates_TSX[..., : 3 * width], d_gates_TSX[..., width:]
        w_nrz = w_ih.roll(width, dims=0)
        d_x_TSD = (d_given_TSG.flatten(0, 1) @ w_nrz).view_as(x_TSD) if ctx.needs_input_grad[0] else None
        d_w_ih = (d_given_TSG.flatten(0, 1).T @ x_TSD.flatten(0, 1)).roll(-width, dims=0)
        d_w_hh = d_hidden_TSG[1:].flatten(0, 1).T @ states_TSU[1:].flatten(0, 1)
        d_b_ih, d_b_hh = d_bias_X[: 3 * width].roll(-width), d_bias_X[width:].clone()
        return d_x_TSD, d_w_ih.to(exact), d_w_hh.to(exact), d_b_ih, d_b_hh, None, None


def _exact(stored: Tensor, buffer: Tensor) -> Tensor:
    """What is stored in the products' precision, in the states': itself where these are one, else a copy."""
    return stored if stored.dtype == buffer.dtype else buffer.copy_(stored)


@contextmanager
def _kept(stored: Tensor, buffer: Tensor) -> Generator[Tensor]:
    """Where to compute what is then stored in the products' precision: its own place where this is the states' too."""
    if stored.dtype == buffer.dtype:
        yield stored
        return
    yield buffer
    stored.copy_(buffer)


_tanh_backward, _sigmoid_backward = torch.ops.aten.tanh_backward.grad_input, torch.ops.aten.sigmoid_backward.grad_input


def _tanh_(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In place. Where products are rounded to bf16, by the sigmoid, which a CPU computes ten times as fast: an error of
    1e-7."""
    return x.tanh_() if dtype == x.dtype else x.mul_(2).sigmoid_().mul_(2).sub_(1)
