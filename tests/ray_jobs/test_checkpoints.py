"""Checkpoints on a store: whole or invisible, damaged ones named, old ones removed."""

from pathlib import Path

import pytest

from ray_jobs.checkpoints import Checkpoints
from shards.store import Store, open_store


def _directory(folder: Path, text: str) -> Path:
    directory = folder / "local" / text
    directory.mkdir(parents=True)
    (directory / "weights").write_text(text)
    (directory / "config").write_text("{}")
    return directory


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_fetched_checkpoint_is_the_saved_one(tmp_path: Path, store: Store) -> None:
    Checkpoints(store).save("stage1-epoch00001", _directory(tmp_path, "one"))
    Checkpoints(store).fetch("stage1-epoch00001", tmp_path / "back")
    assert (tmp_path / "back" / "weights").read_text() == "one"


def test_checkpoint_cut_off_while_it_is_written_does_not_exist(tmp_path: Path, store: Store) -> None:
    checkpoints = Checkpoints(store)
    checkpoints.save("stage1-epoch00001", _directory(tmp_path, "one"))
    store.write("stage1-epoch00002/weights", b"half")
    assert checkpoints.names() == ["stage1-epoch00001"]


def test_damaged_checkpoint_is_named_with_the_remedy(tmp_path: Path, store: Store) -> None:
    Checkpoints(store).save("stage1-epoch00001", _directory(tmp_path, "one"))
    (weights,) = [path for path in store.list() if path.endswith("weights")]
    store.write(weights, b"flipped")
    with pytest.raises(ValueError, match=r"stage1-epoch00001/.*/weights is damaged .* delete the checkpoint"):
        Checkpoints(store).fetch("stage1-epoch00001", tmp_path / "back")


def test_newest_checkpoints_are_kept_and_nothing_of_the_older_ones_is_left(tmp_path: Path, store: Store) -> None:
    checkpoints = Checkpoints(store, keep=2)
    for epoch in ("stage1-epoch00009", "stage1-epoch00010", "stage2-epoch00001"):
        checkpoints.save(epoch, _directory(tmp_path, epoch))
    assert checkpoints.names() == ["stage1-epoch00010", "stage2-epoch00001"]
    assert not store.list("stage1-epoch00009/")


def test_writer_that_was_given_up_cannot_harm_the_checkpoint_of_its_successor(tmp_path: Path, store: Store) -> None:
    Checkpoints(store).save("stage1-epoch00001", _directory(tmp_path, "successor"))
    Checkpoints(store).save("stage1-epoch00001", _directory(tmp_path, "given up"))
    Checkpoints(store).fetch("stage1-epoch00001", tmp_path / "back")
    assert (tmp_path / "back" / "weights").read_text() == "successor"
