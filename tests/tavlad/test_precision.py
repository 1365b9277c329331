"""What is called float32 is computed so on a GPU too. Where there is none, it is the settings that show it."""

from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tavlad.checkpoint import save_checkpoint
from tavlad.codebook import sample_maps
from tavlad.config import CodebookConfig
from tavlad.evaluate import evaluate
from tavlad.frozen import fold
from tavlad.model import TaVlad
from tavlad.parallel import autocast
from tavlad.precision import exact_float32
from tavlad.predict import Predictor
from tavlad.train import Listeners, StagePlan, fit
from tests.tavlad import tiny

_CPU = torch.device("cpu")


_BACKENDS: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)


def _settings() -> tuple[str, ...]:
    return tuple(backend.fp32_precision for backend in _BACKENDS)


@pytest.fixture(autouse=True)
def _tf32_wherever_pytorch_may() -> Generator[None]:
    before = _settings()
    for backend in _BACKENDS:
        backend.fp32_precision = "tf32"
    yield
    for backend, setting in zip(_BACKENDS, before, strict=True):
        backend.fp32_precision = setting


class _Watched:
    """A model that notes the settings under which its parts run, forwards and backwards."""

    def __init__(self, model: TaVlad) -> None:
        self.model = model
        self.seen: dict[str, set[tuple[str, ...]]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d | nn.GRU | nn.Linear) or module is model.vlad:
                module.register_forward_hook(self._noting(name))
        for name, parameter in model.named_parameters():
            parameter.register_hook(self._noting(f"gradient of {name}"))

    def _noting(self, name: str) -> Callable[..., None]:
        return lambda *_: self.seen.setdefault(name, set()).add(_settings()) or None

    def require_exact(self, *names: str) -> None:
        assert set(names) <= set(self.seen)
        assert {each for settings in self.seen.values() for each in settings} == {("ieee",) * 3}


def test_training_and_scoring_run_without_tf32() -> None:
    watched = _Watched(tiny.build_model())
    plan = StagePlan(number=2, stage=tiny.STAGE2, training=tiny.TRAINING)
    fit(watched.model, plan, tiny.TinyBatches(), tiny.TinyBatches(), Listeners(on_epoch=lambda _: None))
    convolution = "trunk.layer4.1.conv2"
    watched.require_exact(
        convolution, f"gradient of {convolution}.weight", "trunk.conv1", "vlad", "gradient of vlad.bias"
    )
    watched.require_exact("gradient of gru.weight_ih_l0", "classifier", "gradient of classifier.weight")
    watched.seen.clear()
    evaluate(watched.model, tiny.TinyBatches().epoch(0), "float32")
    watched.require_exact("trunk.conv1", "trunk.layer4.1.conv2", "vlad", "classifier")
    assert _settings() == ("tf32",) * 3, "what others of the process have set is as it was"


def test_prediction_and_codebook_run_without_tf32(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", tiny.build_model(), tiny.CARD)
    predictor = Predictor(tmp_path / "model", device="cpu")
    frames_BTCHW = next(tiny.TinyBatches().epoch(0)).frames_BTCHW
    watched = _Watched(predictor._model)
    for predict in (predictor.predict_frames, predictor.attention):
        watched.seen.clear()
        predict(frames_BTCHW)
        watched.require_exact("trunk.conv1")
    watched = _Watched(tiny.build_model())
    sample_maps(watched.model, tiny.TinyBatches().epoch(0), CodebookConfig(frames=2), 0, "float32")
    watched.require_exact("trunk.conv1")


def test_folding_is_proved_without_tf32() -> None:
    watched = _Watched(tiny.build_model())
    fold(watched.model.trunk)
    watched.require_exact("trunk.conv1")


def test_bf16_stays_what_it_is() -> None:
    with autocast(_CPU, "bf16"):
        assert _settings() == ("ieee",) * 3
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(_CPU, "float32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_first_to_leave_takes_it_from_nobody() -> None:
    """Threads share the settings: the answer of one request must not change the arithmetic of another's."""
    one, other = ExitStack(), ExitStack()
    one.enter_context(exact_float32())
    other.enter_context(exact_float32())
    one.close()
    assert _settings() == ("ieee",) * 3
    other.close()
    assert _settings() == ("tf32",) * 3


def test_error_inside_restores_the_settings() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), exact_float32():
        fail()
    assert _settings() == ("tf32",) * 3
