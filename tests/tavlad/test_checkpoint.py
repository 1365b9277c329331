"""Models on disk: what is loaded is what was saved, and what does not fit is named."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tavlad.checkpoint import CARD as CARD_FILE
from tavlad.checkpoint import WEIGHTS, load_model, load_state, load_weights_into, save_checkpoint
from tests.tavlad.tiny import CARD, CONFIG, TinyBatches, build_model


def test_loaded_model_is_the_saved_one_to_the_bit(tmp_path: Path) -> None:
    model = build_model().eval()
    save_checkpoint(tmp_path / "model", model, CARD)
    loaded, card = load_model(tmp_path / "model")
    assert card == CARD
    frames = next(TinyBatches().epoch(0)).frames_BTCHW
    with torch.no_grad():
        assert torch.equal(loaded(frames), model(frames))


def test_checkpoint_has_the_tensor_names_of_the_contract(tmp_path: Path) -> None:
    names = set(build_model().state_dict())
    assert {"trunk.conv1.weight", "trunk.fc.weight", "vlad.weight", "vlad.bias", "vlad.centres"} < names
    assert {"gru.weight_ih_l0", "gru.weight_hh_l0", "classifier.weight", "classifier.bias"} < names


def test_checkpoint_of_another_configuration_names_the_first_tensor_that_differs(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_model(), CARD)
    other = build_model(dataclasses.replace(CONFIG, num_clusters=4))
    with pytest.raises(ValueError, match=r"another configuration: tensor classifier\.weight has shape \(4, 15\)"):
        load_weights_into(other, tmp_path / "model")


def test_failed_save_leaves_the_older_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "model", build_model(), CARD)
    before = (tmp_path / "model" / WEIGHTS).read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("tavlad.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "model", build_model(seed=1), CARD)
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == before


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_model(), CARD)
    path = tmp_path / "model" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing or damaged"):
        load_model(tmp_path / "model")


def test_card_of_another_format_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_model(), CARD)
    path = tmp_path / "model" / CARD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads format 2"):
        load_model(tmp_path / "model")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason='needs the extra "timm"')
def test_model_of_format_1_is_read_unless_its_trunk_ran_without_activations(tmp_path: Path) -> None:
    for trunk in ("resnet18", "timm:resnet18", "timm:test_byobnet"):
        config = dataclasses.replace(CONFIG, trunk=trunk)
        save_checkpoint(tmp_path, build_model(config), dataclasses.replace(CARD, model=config))
        load_model(tmp_path)
        path = tmp_path / CARD_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
        if trunk != "timm:test_byobnet":
            load_model(tmp_path)
    with pytest.raises(ValueError, match=r'trunk = "timm:test_byobnet" ran without its activations .* train it again'):
        load_model(tmp_path)


def test_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: it has no config\.json"):
        load_model(tmp_path)


def test_model_without_a_training_state_cannot_be_resumed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", build_model(), CARD)
    with pytest.raises(ValueError, match=r"cannot be resumed from: it has no state\.pt"):
        load_state(tmp_path / "model")
