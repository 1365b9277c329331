"""What makes training quick or small changes nothing that is learned."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tavlad.ahead import batches_on
from tavlad.config import TrainingConfig
from tavlad.model import TaVlad
from tavlad.optim import choose_trained
from tavlad.train import Listeners, StagePlan, fit
from tests.tavlad import tiny

_BELOW_LAST_BLOCK = 2
"""Side of the map that the last block is given, of images of 32 pixels."""


def _saved(model: TaVlad) -> list[Tensor]:
    """What autograd keeps of a forward pass of stage 2."""
    batch = next(tiny.TinyBatches().epoch(0))
    saved: list[Tensor] = []
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        model(batch.inputs(torch.device("cpu")))
    return saved


def _maps(saved: list[Tensor]) -> list[Tensor]:
    """Of them the trunk's maps, not its weights."""
    return [each for each in saved if each.ndim == 4 and len(each) == 12]


def test_autograd_keeps_nothing_of_frozen_layers() -> None:
    model = tiny.build_model()
    choose_trained(model, tiny.STAGE2)
    maps = _maps(_saved(model))
    assert maps
    assert max(each.shape[-1] for each in maps) == _BELOW_LAST_BLOCK


def _trained(training: TrainingConfig, epochs: int = 1) -> TaVlad:
    model = tiny.build_model()
    plan = StagePlan(number=2, stage=dataclasses.replace(tiny.STAGE2, epochs=epochs), training=training)
    fit(model, plan, tiny.TinyBatches(), None, Listeners(on_epoch=lambda _: None))
    return model


def test_recomputing_the_last_block_keeps_less_and_learns_the_same() -> None:
    expected, found = _trained(tiny.TRAINING), _trained(dataclasses.replace(tiny.TRAINING, recompute=True))
    for name, weights in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), weights), name
    assert len(_maps(_saved(found))) < len(_maps(_saved(expected)))


def test_on_a_cpu_batches_are_given_as_they_are() -> None:
    batches = list(tiny.TinyBatches().epoch(0))
    assert all(one is other for one, other in zip(batches, batches_on(torch.device("cpu"), batches), strict=True))


def test_without_a_compiler_the_setting_and_the_remedy_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", _fails)
    with pytest.raises(ValueError, match=r"training\.compile = true.*no compiler.*g\+\+.*training\.compile = false"):
        _trained(dataclasses.replace(tiny.TRAINING, compile=True))


def _fails(_: object) -> object:
    raise RuntimeError("no compiler")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"cuda_graphs": True}])  # on a CPU no graph is recorded
def test_a_compiled_trunk_learns_the_same_up_to_rounding(changes: dict[str, Any]) -> None:
    compiled = dataclasses.replace(tiny.TRAINING, compile=True, **changes)
    expected, found = _trained(tiny.TRAINING), _trained(compiled)
    for name, weights in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), weights, rtol=1e-2, atol=2e-3)
