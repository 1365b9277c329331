"""Models on disk: what is loaded is what was saved, and what does not fit is named."""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tavlad.checkpoint import CARD as CARD_FILE
from tavlad.checkpoint import (
    STATE,
    WEIGHTS,
    TrainState,
    load_card,
    load_model,
    load_state,
    load_weights_into,
    save_checkpoint,
)
from tavlad.model import TaVlad
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


SMALL = dataclasses.replace(CONFIG, trunk="squeezenet1_1")


def _save_numbered(directory: Path, model: TaVlad, number: int) -> None:
    """A checkpoint all of whose files say the number."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    card = dataclasses.replace(CARD, model=SMALL, provenance={"number": number})
    save_checkpoint(directory, model, card, TrainState(stage=1, next_epoch=number, optimizer={}))


def _numbers_in(directory: Path, model: TaVlad) -> set[float]:
    """What the files of a checkpoint say: one number, if they are of one checkpoint."""
    load_weights_into(model, directory)
    of_weights = {value for each in model.parameters() for value in each.unique().tolist()}
    return of_weights | {load_card(directory).provenance["number"], load_state(directory).next_epoch}


def _save_until_killed(directory: Path, model: TaVlad, number: int, operations: int) -> bool:
    """Save in a process that ends before a file operation, after so many; False if that is after the last one."""
    child = os.fork()
    if not child:
        _save_and_die(directory, model, number, operations)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def _save_and_die(directory: Path, model: TaVlad, number: int, operations: int) -> NoReturn:
    done = 0

    def count(event: str, _: object) -> None:
        nonlocal done
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if done == operations:
                os._exit(1)
            done += 1

    sys.addaudithook(count)
    _save_numbered(directory, model, number)
    os._exit(0)


def _kill_at_every_operation(folder: Path) -> None:
    torch.set_num_threads(1)
    model, operations, found = build_model(SMALL), 0, list[int]()
    while True:
        directory = folder / str(operations) / "model"
        _save_numbered(directory, model, 1)
        was_killed = _save_until_killed(directory, model, 2, operations)
        (number,) = _numbers_in(directory, model)
        found.append(int(number))
        _save_numbered(directory, model, 3)
        assert _numbers_in(directory, model) == {3}, "what a killed process left stands in nobody's way"
        shutil.rmtree(directory.parent)
        if not was_killed:
            break
        operations += 1
    assert operations > 10
    assert found == sorted(found), f"{found}: the new one, once it is there, stays"
    assert set(found) == {1, 2}


@pytest.mark.slow
def test_save_that_is_killed_leaves_the_older_checkpoint_or_the_newer_one(tmp_path: Path) -> None:
    process = get_context("spawn").Process(target=_kill_at_every_operation, args=(tmp_path,))  # forks: has no threads
    process.start()
    process.join()
    assert process.exitcode == 0


def test_checkpoint_is_on_the_disk_before_the_older_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, done = build_model(SMALL), list[str]()
    sync, remove = os.fsync, shutil.rmtree

    def watched_sync(descriptor: int) -> None:
        done.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name.partition('-')[0]}")
        sync(descriptor)

    def watched_remove(path: Path, **options: Any) -> None:
        if path.exists():
            done.append(f"remove {path.name}")
        remove(path, **options)

    _save_numbered(tmp_path / "model", model, 1)
    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(shutil, "rmtree", watched_remove)
    _save_numbered(tmp_path / "model", model, 2)
    files = {f"sync {name}" for name in (WEIGHTS, CARD_FILE, STATE)}
    assert set(done[:3]) == files
    assert done[3:] == ["sync model.partial", f"sync {tmp_path.name.partition('-')[0]}", "remove model.replaced"]
    assert _numbers_in(tmp_path / "model", model) == {2}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
