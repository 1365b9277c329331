"""The report is one file that needs nothing else, says every number it was given, and takes any text for text."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.report import DemoModel, DemoReport, Filmstrip, Step, write_report

ACTIONS = ("grow", "shrink")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags that were opened, links and picture sources, the text; refuses tags that are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "href":
                self.links.append(value or "")
            elif name in ("src", "srcset", "data", "poster"):
                self.sources.append(value or "")
            assert not name.startswith("on")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def model(**changes: Any) -> DemoModel:
    epochs = [{"stage": 1, "epoch": 1, "train/loss": 1.0, "train/top1": 0.5, "test/top1": 0.5}]
    given = DemoModel(
        variant="vlad-gru-64",
        temporal="gru",
        split=1,
        name="tavlad-demo-split1",
        version="3",
        is_best=True,
        test_top1=0.9375,
        test_mean_class=0.9,
        within_pair_top1=0.955,
        confusion_AA=np.array([[5, 1], [0, 6]]),
        epochs=epochs,
        run_url="http://127.0.0.1:5000/#/experiments/1/runs/abc",
    )
    return dataclasses.replace(given, **changes)


def report(**changes: Any) -> DemoReport:
    frames = np.full((4, 24, 32, 3), 128, np.uint8)
    given = DemoReport(
        dataset="demo",
        num_clips=288,
        actions=ACTIONS,
        models=[model(), model(variant="actionvlad", temporal="sum", version="4", is_best=False, within_pair_top1=0.5)],
        steps=[Step(name="videos", seconds=111.75), Step(name="packing", seconds=8.0)],
        tracking_uri="http://127.0.0.1:5000",
        filmstrips=[
            Filmstrip(frames_THWC=frames, true_action="grow", predicted_action="grow", probability=0.875),
            Filmstrip(frames_THWC=frames, true_action="grow", predicted_action="shrink", probability=0.625),
        ],
    )
    return dataclasses.replace(given, **changes)


def write(tmp_path: Path, given: DemoReport) -> str:
    path = tmp_path / "reports" / "demo.html"
    write_report(path, given)
    assert [each.name for each in path.parent.iterdir()] == ["demo.html"], "nothing half-written is left"
    return path.read_text(encoding="utf-8")


def test_report_needs_no_other_file_and_runs_no_script(tmp_path: Path) -> None:
    source = write(tmp_path, report())
    page = Page(source)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.sources) == 2 + 2 + 2, "two filmstrips, and for each model a confusion matrix and curves"
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", each) for each in page.sources)
    assert "@import" not in source
    assert "url(" not in source
    assert set(page.links) == {"http://127.0.0.1:5000", "http://127.0.0.1:5000/#/experiments/1/runs/abc"}


def test_report_says_what_it_was_given(tmp_path: Path) -> None:
    text = Page(write(tmp_path, report())).text.replace("\xa0", " ")
    for words in (
        "288 clips of 2 actions (grow, shrink)",
        "2 min 0 s",
        "vlad-gru-64",
        "93.8 %",
        "90.0 %",
        "95.5 %",
        "tavlad-demo-split1 v3 best",
        "actionvlad",
        "50.0 %",
        "videos111.8",
        "shows grow, predicted grow (87.5 %)",
        "shows grow, predicted ✗ shrink (62.5 %)",
        "tavlad predict tavlad-demo-split1@best VIDEO",
        "tavlad down",
    ):
        assert words in text
    assert "v4 best" not in text


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    nasty = '<b onclick="x">&"\'$a$</b>'
    strip = dataclasses.replace(report().filmstrips[0], true_action=nasty, predicted_action=nasty)
    nasty_model = model(variant=nasty, temporal=nasty, name=nasty, version=nasty, run_url=f"http://x/{nasty}")
    given = report(
        dataset=nasty,
        actions=("grow", nasty),
        models=[nasty_model],
        steps=[Step(name=nasty, seconds=1.0)],
        tracking_uri=f"http://x/{nasty}",
        filmstrips=[strip],
    )
    page = Page(write(tmp_path, given))  # refuses handlers such as onclick
    assert page.text.count(nasty) >= 10
    assert set(page.links) == {f"http://x/{nasty}"}


def test_sets_without_pairs_and_without_videos_leave_those_parts_out(tmp_path: Path) -> None:
    plain = report(models=[model(within_pair_top1=None)], filmstrips=[])
    text = Page(write(tmp_path, plain)).text
    assert "time-reversed" not in text
    assert "Test videos" not in text
    assert "–" in text


@pytest.mark.parametrize(("num_actions", "is_listed"), [(20, True), (101, False)])
def test_actions_are_listed_when_they_are_few(tmp_path: Path, num_actions: int, is_listed: bool) -> None:
    actions = tuple(f"action {label}" for label in range(num_actions))
    counts = np.eye(num_actions, dtype=np.int64)
    given = report(actions=actions, models=[model(confusion_AA=counts)], filmstrips=[])
    source = write(tmp_path, given)
    assert ("action 19" in Page(source).text) == is_listed
    assert ('<div class="beside">' in source) == is_listed
