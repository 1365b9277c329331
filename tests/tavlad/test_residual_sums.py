"""The VLAD layer's written-out gradients are those of its formula, and its clips know nothing of each other."""

import pytest
import torch
from torch import Tensor

from tavlad.vlad import Vlad

B, T, N, K, D = 3, 2, 5, 4, 6


def _textbook(vlad: Vlad, x_BTND: Tensor, attention_BTN: Tensor | None) -> Tensor:
    """Eq. 1 with the tensor of all residuals."""
    assign_BTNK = vlad.assign(x_BTND)
    if attention_BTN is not None:
        assign_BTNK = assign_BTNK * attention_BTN[..., None]
    return (assign_BTNK[..., None] * (x_BTND[..., None, :] - vlad.centres)).sum(dim=2)


def _layer(dtype: torch.dtype) -> Vlad:
    torch.manual_seed(0)
    vlad = Vlad(K, D).to(dtype)
    for parameter in vlad.parameters():  # as after some steps: no longer tied to each other
        torch.nn.init.normal_(parameter)
    return vlad


def _inputs(with_attention: bool, dtype: torch.dtype) -> list[Tensor]:
    x_BTND = torch.randn(B, T, N, D, dtype=dtype, requires_grad=True)
    return [x_BTND, torch.rand(B, T, N, dtype=dtype, requires_grad=True)] if with_attention else [x_BTND]


@pytest.mark.parametrize("with_attention", [True, False])
def test_sums_and_gradients_are_the_textbooks(with_attention: bool) -> None:
    vlad, inputs = _layer(torch.float64), _inputs(with_attention, torch.float64)
    found, expected = vlad(*inputs), _textbook(vlad, *inputs, *([] if with_attention else [None]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    tensors = [*inputs, *vlad.parameters()]
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    )
    for of_found, of_expected in pairs:
        torch.testing.assert_close(of_found, of_expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("with_attention", [True, False])
def test_gradients_are_the_slopes(with_attention: bool) -> None:
    vlad, inputs = _layer(torch.float64), _inputs(with_attention, torch.float64)
    assert torch.autograd.gradcheck(lambda *_: vlad(*inputs), (*inputs, *vlad.parameters()))


def test_only_the_last_rounding_depends_on_the_type_asked_for() -> None:
    vlad, inputs = _layer(torch.float32), _inputs(True, torch.float32)
    exact, rounded = vlad(*inputs), vlad(*inputs, dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.bfloat16())
    assert exact.transpose(0, 1).is_contiguous(), "the GRU takes the frames first"


def test_a_clips_sums_do_not_depend_on_the_clips_beside_it() -> None:
    vlad, (x_BTND, attention_BTN) = _layer(torch.float32), _inputs(True, torch.float32)
    assert torch.equal(vlad(x_BTND, attention_BTN)[1:2], vlad(x_BTND[1:2], attention_BTN[1:2]))


def test_what_needs_no_gradient_gets_none() -> None:
    vlad, (x_BTND, attention_BTN) = _layer(torch.float32), _inputs(True, torch.float32)
    vlad(x_BTND.detach(), attention_BTN.detach()).sum().backward()
    assert x_BTND.grad is None
    assert attention_BTN.grad is None
    assert vlad.centres.grad is not None


def test_no_share_is_kept_that_processors_are_slow_with() -> None:
    vlad, (x_BTND,) = _layer(torch.float32), _inputs(False, torch.float32)
    with torch.no_grad():
        vlad.weight.mul_(30)  # logits as at the paper's sharpness
    exact = vlad.double().assign(x_BTND.double())
    assert ((exact > 0) & (exact < 1e-38)).any(), "the case is not what it is meant to be"
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        vlad.float()(x_BTND)
    (assign_BTNK,) = (each for each in saved if each.shape == (B, T, N, K))
    tiny = torch.finfo(torch.float32).tiny
    assert not ((assign_BTNK > 0) & (assign_BTNK < tiny)).any()
    torch.testing.assert_close(assign_BTNK.double(), exact, rtol=1e-4, atol=1e-20)
