"""The systems without VLAD against slow formulas: frames scored alone, or by an LSTM that looks at places."""

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tavlad.config import ModelConfig
from tavlad.draws import RandomFrame
from tavlad.frame_heads import SoftAttentionLstm, mean_of_probabilities
from tavlad.optim import choose_trained
from tavlad.train import Listeners, StagePlan, fit
from tests.tavlad.tiny import CONFIG, STAGE1, TRAINING, TinyBatches, build_model

Array = NDArray[np.float64]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _written_out(lstm: SoftAttentionLstm, places_TND: Array) -> Array:
    """(T, U): the states, one frame and one place after the other."""
    weights = {name: tensor.detach().numpy() for name, tensor in lstm.state_dict().items()}
    width = lstm.cell.hidden_size
    mean_D = places_TND.reshape(-1, places_TND.shape[2]).mean(axis=0)
    begin = np.tanh(weights["begin.weight"] @ mean_D + weights["begin.bias"])
    h, c = begin[:width], begin[width:]
    states = []
    for places_ND in places_TND:
        scores = []
        for x_D in places_ND:
            key = weights["of_place.weight"] @ x_D + weights["of_place.bias"]
            scores.append(float(weights["score.weight"][0] @ np.tanh(key + weights["of_state.weight"] @ h)))
        look = np.exp(np.array(scores)) / np.sum(np.exp(scores))
        seen = sum(a * x_D for a, x_D in zip(look, places_ND, strict=True))
        gates = (
            weights["cell.weight_ih"] @ seen
            + weights["cell.bias_ih"]
            + weights["cell.weight_hh"] @ h
            + weights["cell.bias_hh"]
        )
        i, f, g, o = np.split(gates, 4)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.array(states)


def test_lstm_with_soft_attention_is_the_written_out_recurrence() -> None:
    torch.manual_seed(0)
    lstm = SoftAttentionLstm(6, 4).double()
    places_BTND = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    expected = np.array([_written_out(lstm, clip) for clip in places_BTND.numpy()])
    np.testing.assert_allclose(lstm(places_BTND).detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_single_frames_agree_by_their_probabilities() -> None:
    logits_BTA = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mean_of_probabilities(logits_BTA).softmax(dim=1)
    torch.testing.assert_close(found, logits_BTA.softmax(dim=2).mean(dim=1), check_dtype=False)


def test_training_on_single_frames_sees_one_random_frame_and_testing_sees_all() -> None:
    frames = torch.arange(5, dtype=torch.uint8).repeat(64, 1)[:, :, None, None, None].expand(64, 5, 3, 2, 2)
    torch.manual_seed(0)
    drawn = RandomFrame()(frames)
    assert drawn.shape == (64, 1, 3, 2, 2)
    assert set(drawn[:, 0, 0, 0, 0].tolist()) == {0, 1, 2, 3, 4}

    model = build_model(dataclasses.replace(CONFIG, attention="none", temporal="single-frame", dropout=0.0))
    clips = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        model.eval()
        whole = model(clips).softmax(dim=1)
        alone = torch.stack([model(clips[:, [t]]).softmax(dim=1) for t in range(3)]).mean(dim=0)
        torch.testing.assert_close(whole, alone)
        model.train()
        torch.manual_seed(0)
        one = model(clips)
        torch.manual_seed(0)
        torch.testing.assert_close(one, model.eval()(RandomFrame()(clips)))


@pytest.mark.parametrize("temporal", ["change", "consensus", "single-frame", "lstm-attention"])
def test_systems_without_vlad_train_their_head_in_stage_1(temporal: str) -> None:
    model = build_model(dataclasses.replace(CONFIG, attention="none", temporal=temporal))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses: list[float] = []
    listeners = Listeners(on_epoch=lambda report: losses.append(report.metrics["train/loss"]))
    fit(model, StagePlan(number=1, stage=STAGE1, training=TRAINING), TinyBatches(), TinyBatches(6), listeners)
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == ({"classifier", "lstm"} if temporal == "lstm-attention" else {"classifier"})
    choose_trained(model, STAGE1)
    assert all(parameter.requires_grad for parameter in model.classifier.parameters())
    with pytest.raises(ValueError, match=rf'model\.temporal = "{temporal}" has no VLAD to weigh'):
        ModelConfig(temporal=temporal)  # type: ignore[arg-type]
