"""The written-out GRU is torch's own, in values and in every gradient."""

import pytest
import torch
from torch import nn

from tavlad.gru import gru_states

S, T, D, U = 6, 5, 7, 4


def _gradients(state_SU: torch.Tensor, gru: nn.GRU, x: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, state_SU.numel(), dtype=state_SU.dtype).reshape(state_SU.shape)
    return list(torch.autograd.grad((state_SU * weights).sum(), [*gru.parameters(), x]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_states_and_gradients_are_those_of_torchs_gru(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    gru = nn.GRU(D, U, batch_first=True).to(dtype)
    x_STD = torch.randn(S, T, D, dtype=dtype, requires_grad=True)
    expected, found = gru(x_STD)[0].transpose(0, 1), gru_states(x_STD.transpose(0, 1), gru)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    pairs = zip(_gradients(found, gru, x_STD), _gradients(expected, gru, x_STD), strict=True)
    for of_found, of_expected in pairs:
        torch.testing.assert_close(of_found, of_expected, rtol=tolerance, atol=tolerance)


def test_products_in_bf16_stay_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    gru, x_STD = nn.GRU(64, 32, batch_first=True), torch.randn(S, 25, 64, requires_grad=True)
    exact, rounded = gru_states(x_STD.transpose(0, 1), gru), gru_states(x_STD.transpose(0, 1), gru, torch.bfloat16)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.02)
    pairs = zip(_gradients(rounded, gru, x_STD), _gradients(exact, gru, x_STD), strict=True)
    for of_rounded, of_exact in pairs:
        assert (of_rounded - of_exact).norm() < 0.02 * of_exact.norm()


def test_input_without_gradient_gets_none() -> None:
    gru, x_TSD = nn.GRU(D, U), torch.randn(T, S, D)
    gru_states(x_TSD, gru).sum().backward()
    assert x_TSD.grad is None
    assert gru.weight_ih_l0.grad is not None
