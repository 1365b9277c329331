"""Reproduction: what is done is found, what departs from the paper is said, and the report holds every number."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_jobs import reproduce as verb
from ray_jobs.console import Console
from ray_jobs.published import paper_set, published_table
from ray_jobs.recipe import load_recipe
from ray_jobs.reproduce import ReproduceOptions
from ray_jobs.reproduce_report import Entry, Outcome, Reproduction, write_reproduction
from shards.index import SCHEMA, make_index, share_of
from tavlad.errors import UserError
from tests.ray_jobs.test_report import Page

OUTCOME = Outcome(
    training="hmdb51-split1-ta-vlad-0123456789",
    top1=0.55,
    mean_class=0.5,
    best_on_test=0.6,
    num_test_clips=1530,
    epochs=80,
    wall_seconds=4000.0,
    model="tavlad-hmdb51-split1 v3",
    run_url="http://127.0.0.1:5000/#/experiments/1/runs/abc",
    history=[{"stage": 1, "epoch": 1, "train/loss": 1.0, "train/top1": 0.5, "test/top1": 0.6}],
)


def _report(table: Any, departures: list[str], dataset: str = "hmdb51", **given: Any) -> Reproduction:
    entries = [
        Entry(row=row, dataset=dataset, split=split)
        for row in published_table(table)
        if row.recipe is not None
        for split in ((1,) if table == 1 else (1, 2, 3))
    ]
    entries = [dataclasses.replace(e, **given) if e.row.recipe == "ta-vlad" else e for e in entries]
    return Reproduction(
        table=table,
        datasets=[dataset],
        entries=entries,
        departures=departures,
        tracking_uri="http://127.0.0.1:5000",
    )


def test_every_published_number_of_both_tables_is_there() -> None:
    table1 = {row.recipe: row.accuracy.get("hmdb51") for row in published_table(1)}
    assert table1 == {
        "actionvlad": 53.1,
        "vlad-gru-512": 54.4,
        "vlad-gru-256": 54.7,
        "vlad-gru-128": 54.1,
        "ta-vlad": 56.1,
        "ta-vlad-frozen-cam": 55.3,
        "consensus": None,
        "ta-vlad-flow": None,
        None: None,
    }
    table2 = {row.name: (row.accuracy["hmdb51"], row.accuracy["ucf101"]) for row in published_table(2)}
    assert table2 == {
        "TA-VLAD": (54.1, 85.7),
        "ActionVLAD": (49.8, 80.3),
        "TSN": (51.0, 85.1),
        "Two-Stream VGG": (40.5, 73.0),
        "Two-Stream ResNet": (43.4, 82.3),
        "LSTM Soft Attention": (41.3, 84.9),
        "TDD": (50.0, 82.8),
        "I3D": (49.8, 84.5),
    }
    (ours,) = [row for row in published_table(2) if row.recipe == "ta-vlad"]
    assert ours.splits == {"hmdb51": [56.1, 52.4, 53.7], "ucf101": [85.9, 85.7, 85.4]}
    assert sum(ours.splits["hmdb51"]) / 3 == pytest.approx(54.1, abs=0.05)


@pytest.mark.parametrize("table", [1, 2])
def test_every_row_that_is_run_has_a_recipe(table: Any) -> None:
    for row in published_table(table):
        if row.recipe is not None:
            load_recipe(row.recipe, dataset="any")


def test_only_the_papers_sets_are_compared_with_the_paper() -> None:
    assert [paper_set(name) for name in ("hmdb51", "HMDB-51-rehearsal", "ucf101", "weizmann")] == [
        "hmdb51",
        "hmdb51",
        "ucf101",
        None,
    ]


def test_result_is_the_last_epoch_and_the_best_on_test_stands_apart(tmp_path: Path) -> None:
    document = write_reproduction(tmp_path, _report(1, [], outcome=OUTCOME))
    assert document == json.loads((tmp_path / "report.json").read_text())
    (row,) = [each for each in document["trainings"] if each["recipe"] == "ta-vlad"]
    assert (row["top1"], row["best_on_test"], row["paper_top1"]) == (0.55, 0.6, 0.561)
    assert row["difference"] == pytest.approx(-0.011)
    page = Page((tmp_path / "report.html").read_text())
    assert "best on test (no result)" in page.text
    assert re.search(r"55\.0\s%60\.0\s%56\.1\s%-1\.115301 h 6 min", page.text)
    assert OUTCOME.run_url in page.links
    assert all(source.startswith("data:") for source in page.sources), "one file"
    assert "Run in full, as the paper describes it." in page.text
    assert page.text.count("not done yet") == 7


def test_rehearsal_is_told_in_words_and_a_failure_with_its_reason(tmp_path: Path) -> None:
    departures = ["10% of the clips, for training and for testing alike", "epochs multiplied by 0.1"]
    write_reproduction(tmp_path, _report(1, departures, failure="no <weights>"))
    page = Page((tmp_path / "report.html").read_text())
    assert (
        "not the paper's training: 10% of the clips, for training and for testing alike; epochs multiplied" in page.text
    )
    assert "no <weights>" in page.text
    assert "Run in full" not in page.text


def test_table_2_averages_three_splits_and_says_what_each_row_is(tmp_path: Path) -> None:
    document = write_reproduction(tmp_path, _report(2, [], outcome=OUTCOME))
    assert [(row["row"], row["paper_top1"]) for row in document["averages"]] == [("TA-VLAD", pytest.approx(0.541))]
    assert document["averages"][0]["top1"] == pytest.approx(0.55)
    text = Page((tmp_path / "report.html").read_text()).text
    assert "I3Dours: torchvision's r3d_18 inflated from ResNet-18" in text
    assert "TDDours: spatial network alone" in text


def test_set_that_is_not_the_papers_has_no_paper_column(tmp_path: Path) -> None:
    document = write_reproduction(tmp_path, _report(1, [], dataset="weizmann", outcome=OUTCOME))
    assert all(row["paper_top1"] is None and row["difference"] is None for row in document["trainings"])


def test_scaled_epochs_keep_the_schedule_in_proportion() -> None:
    recipe = load_recipe("ta-vlad", dataset="any")
    options = ReproduceOptions(table=1, epochs_scale=0.1, subset=0.25)
    scaled = verb._scaled(recipe, options)
    assert (scaled.stage1.epochs, scaled.stage1.decay_every, scaled.stage2.epochs) == (5, 1, 3)
    assert scaled.training.subset == 0.25
    assert verb._scaled(recipe, ReproduceOptions(table=1)) == recipe
    with pytest.raises(ValueError, match=r"--rows nothing: table 1 has the rows actionvlad, "):
        ReproduceOptions(table=1, rows=("nothing",))


def test_change_of_one_row_is_its_own_and_comes_after_those_of_all() -> None:
    changes = ("conv3d-resnet18:model.trunk=r3d_18", "model.trunk=timm:resnet10t", "training.crop=64")
    options = ReproduceOptions(table=2, changes=changes)
    assert options.changes_of("conv3d-resnet18") == [*changes[1:], "model.trunk=r3d_18"]
    assert options.changes_of("ta-vlad") == list(changes[1:])
    with pytest.raises(ValueError, match=r"--set i3d: table 2 has the rows ta-vlad, .*conv3d-resnet18"):
        ReproduceOptions(table=2, changes=("i3d:model.trunk=r3d_18",))


def test_departures_are_what_changes_the_numbers() -> None:
    class _Site:
        mlflow_uri = ""

    def departures(**options: Any) -> list[str]:
        return verb._described(ReproduceOptions(table=1, **options), [], [], _Site()).departures  # type: ignore[arg-type]

    assert departures(changes=("resources.gpus_per_worker=1",)) == []
    assert departures(subset=0.5, epochs_scale=0.1, changes=("training.crop=64",)) == [
        "50% of the clips, for training and for testing alike",
        "epochs multiplied by 0.1",
        "training.crop=64 in every recipe",
    ]
    assert departures(changes=("ta-vlad:training.crop=64",)) == ["training.crop=64 in ta-vlad"]


@pytest.mark.slow
def test_one_row_that_fails_leaves_the_others_and_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(_site: Any, entry: Entry, *_: Any) -> Outcome:
        if entry.row.recipe == "actionvlad":
            raise UserError("no weights here")
        return OUTCOME

    monkeypatch.setattr(verb, "_outcome", outcome)

    monkeypatch.setattr(verb, "_is_packed", lambda _site, _dataset, row: row.modality == "rgb")

    class _Site:
        mlflow_uri = "http://127.0.0.1:5000"

    with pytest.raises(
        ValueError, match=r"not reproduced: actionvlad on hmdb51, split 1; the report gives the reasons"
    ):
        verb.reproduce(_Site(), ["hmdb51"], ReproduceOptions(table=1), tmp_path, Console())  # type: ignore[arg-type]
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["done"] == 6
    assert [row["failure"] for row in document["trainings"]].count("no weights here") == 1


def test_motion_rows_are_run_where_motion_is_packed_and_fused_rows_where_all_parts_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = {"mine-flow"}
    monkeypatch.setattr(verb, "locate_set", lambda _site, name: name)

    class _Store:
        def __init__(self, uri: str, _: Any) -> None:
            self.uri = uri

        def exists(self, path: str) -> bool:
            assert path == "index.parquet"
            return self.uri in packed

    monkeypatch.setattr(verb, "open_store", _Store)

    class _Site:
        s3 = None

    def rows(dataset: str, *chosen: str) -> list[tuple[str | None, tuple[str, ...]]]:
        found = verb._rows(_Site(), dataset, ReproduceOptions(table=1, rows=chosen))  # type: ignore[arg-type]
        return [(row.recipe, row.fuses) for row in found]

    both = ("ta-vlad", "ta-vlad-flow")
    assert rows("mine")[-2:] == [("ta-vlad-flow", ()), (None, both)]
    assert all(recipe != "ta-vlad-flow" and not fuses for recipe, fuses in rows("other"))
    assert rows("other", "ta-vlad-flow", "ta-vlad") == [("ta-vlad", ()), ("ta-vlad-flow", ()), (None, both)]
    assert rows("mine", "ta-vlad-flow") == [("ta-vlad-flow", ())]


def test_fused_row_has_no_best_epoch_and_no_run(tmp_path: Path) -> None:
    fused = dataclasses.replace(OUTCOME, best_on_test=None, history=[], run_url="", model="")
    (row,) = [row for row in published_table(1) if row.fuses]
    report = dataclasses.replace(_report(1, []), entries=[Entry(row=row, dataset="mine", split=1, outcome=fused)])
    document = write_reproduction(tmp_path, report)
    assert document["trainings"][0]["top1"] == OUTCOME.top1
    text = Page((tmp_path / "report.html").read_text()).text.replace("\xa0", "")
    assert "mine155.0%–––1530" in text.replace(" ", "")


def test_share_of_a_set_keeps_every_action_in_every_part_and_grows_with_the_share() -> None:
    generator = np.random.default_rng(0)
    num_clips = 240
    columns: dict[str, list[Any]] = {name: [None] * num_clips for name in SCHEMA.names}
    columns["key"] = [f"clip{row}" for row in range(num_clips)]
    columns["action"] = [f"action{row % 4}" for row in range(num_clips)]
    columns["label"] = [row % 4 for row in range(num_clips)]
    columns["sha256"] = ["0"] * num_clips
    for split in (1, 2, 3):
        columns[f"split{split}"] = generator.choice(["train", "train", "test"], num_clips).tolist()
    index = make_index(
        name="set",
        actions=[f"action{label}" for label in range(4)],
        packing={},
        num_frames=25,
        plan="",
        rows=pa.table(columns, schema=SCHEMA),
    )
    tenth, half = share_of(index, 0.1), share_of(index, 0.5)
    assert share_of(index, 1.0) is index
    assert 0.1 * num_clips <= len(tenth.clips_table) < len(half.clips_table) < num_clips
    assert set(tenth.clips_table.keys()) < set(half.clips_table.keys())
    for split in (1, 2, 3):
        assert set(tenth.clips(split, "test").labels_N.tolist()) == {0, 1, 2, 3}
