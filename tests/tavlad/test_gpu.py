"""On a GPU everything is what it is on a CPU, only sooner."""

import dataclasses

import pytest
import torch

from tavlad.ahead import batches_on
from tavlad.clip import Batch
from tavlad.config import ModelConfig
from tavlad.evaluate import evaluate
from tavlad.model import TaVlad
from tavlad.parallel import World, autocast
from tavlad.train import EpochReport, Listeners, StagePlan, fit
from tests.tavlad import tiny

pytestmark = pytest.mark.needs_gpu
_GPU = torch.device("cuda")


def _train(device: torch.device, **changes: object) -> tuple[TaVlad, list[EpochReport]]:
    model, reports = tiny.build_model(dataclasses.replace(tiny.CONFIG, dropout=0.0)).to(device), list[EpochReport]()
    plan = StagePlan(number=2, stage=tiny.STAGE2, training=dataclasses.replace(tiny.TRAINING, **changes))
    fit(
        model,
        plan,
        tiny.TinyBatches(),
        tiny.TinyBatches(),
        Listeners(on_epoch=reports.append),
        world=World(device=device),
    )
    return model, reports


@pytest.mark.parametrize(
    "changes", [{}, {"recompute": True}, {"compile": True}, {"compile": True, "cuda_graphs": True}]
)
def test_stage_2_learns_the_same_as_on_a_cpu(changes: dict[str, object]) -> None:
    (expected, on_cpu), (found, on_gpu) = _train(torch.device("cpu")), _train(_GPU, **changes)
    for of_cpu, of_gpu in zip(on_cpu, on_gpu, strict=True):
        assert of_gpu.metrics["train/loss"] == pytest.approx(of_cpu.metrics["train/loss"], abs=1e-3)
    for name, weights in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name).cpu(), weights, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("speed", [{}, {"cuda_graphs": True}])
@torch.no_grad()
def test_maps_of_several_passes_through_a_compiled_trunk_are_the_plain_ones(speed: dict[str, bool]) -> None:
    model = tiny.build_model(dataclasses.replace(tiny.CONFIG, trunk="efficientnet_lite0")).to(_GPU).eval()
    frames_BTCHW = torch.randint(0, 256, (50, 25, 3, 32, 32), dtype=torch.uint8, device=_GPU)  # five passes
    with autocast(_GPU, "float32"):
        expected = model.features(frames_BTCHW)
    model.speed(**{"compile": True, "cuda_graphs": False, "recompute": False} | speed)
    for _ in range(3):  # graphs are recorded at the second time
        with autocast(_GPU, "float32"):
            found = model.features(frames_BTCHW)
        torch.testing.assert_close(found.maps_BTDHW, expected.maps_BTDHW, rtol=1e-3, atol=1e-3)


def test_batches_arrive_whole_and_in_order_ahead_of_the_step() -> None:
    expected = list(tiny.TinyBatches(num_clips=10).epoch(0))
    pinned = [dataclasses.replace(each, frames_BTCHW=each.frames_BTCHW.pin_memory()) for each in expected]
    found: list[Batch] = []
    for batch in batches_on(_GPU, pinned):
        torch.cuda._sleep(10_000_000)  # the copy of the next one runs meanwhile
        found.append(batch)
    for one, other in zip(expected, found, strict=True):
        assert other.labels_B.device.type == "cuda"
        assert torch.equal(one.frames_BTCHW, other.inputs(_GPU).cpu())
        assert one.keys == other.keys


@pytest.mark.parametrize("config", [tiny.CONFIG, ModelConfig(trunk="resnet18", weights="none", temporal="sum")])
def test_probabilities_are_the_cpus(config: ModelConfig) -> None:
    model = tiny.build_model(config)
    expected = evaluate(model, tiny.TinyBatches().epoch(0), "float32")
    found = evaluate(model.to(_GPU), tiny.TinyBatches().epoch(0), "float32")
    assert expected.keys == found.keys
    torch.testing.assert_close(
        torch.from_numpy(found.probabilities), torch.from_numpy(expected.probabilities), atol=1e-3, rtol=0
    )
