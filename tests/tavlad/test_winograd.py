"""Winograd's convolution is the convolution, and so are its gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tavlad.winograd import Convolution, convolution


def _all_of(y: Tensor, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("size", [(7, 7), (8, 12), (9, 14), (1, 3)])
def test_convolution_and_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(70, 6, *size, dtype=torch.float64), torch.randn(70, 5, *size, dtype=torch.float64)
    weight, bias = torch.randn(5, 6, 3, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inputs = [each.requires_grad_() for each in (x, weight, bias)]
    found = _all_of(convolution(x, weight, bias), grad, *inputs)
    expected = _all_of(functional.conv2d(x, weight, bias, padding=1), grad, *inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-12 * other.abs().max()


def test_float32_rounds_to_a_few_millionths() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(256, 256, 3, padding=1), torch.randn(3, 256, 14, 14)
    with torch.no_grad():
        found = Convolution.of(conv)(x)
        expected = conv.double()(x.double())
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 3e-5 * expected.abs().max()
