"""A whole site rehearsed on one machine: `make rehearsal`, or `python -m tests.rehearsal [--folder DIR] [--quick]`.

Four hosts (a desk, a store, a Ray head, a worker; see tests/host_cluster.py) come up from nothing. From the desk the
site is checked, videos are packed, a sweep and trainings of two splits run as Ray jobs by two workers on two hosts,
also by plain `ray job submit`; the model is pulled and used. Then a training is repeated whose worker host dies midway
and is replaced: its weights must be those of the undisturbed one. Prints a table; exit code 1 if anything did not hold.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.host_cluster import Cluster, cluster
from tests.hosts import why_not

SMALL = (
    *("--set", "stage1.epochs=6", "--set", "stage2.epochs=2", "--set", "stage1.features=never"),
    *("--set", "training.batch_size=8", "--set", "training.crop=64"),
    *("--set", "model.num_clusters=4", "--set", "model.gru_width=16"),
    *("--set", "resources.workers=2", "--set", "resources.checkpoint_steps=2"),
)
"""A training of a minute, by two workers; a cluster of two hosts with one CPU each puts them on both."""
SPACE = "[stage1]\nlr = [0.001, 0.01]\n"
_NAME = "rehearsal"
_OUT = Console(width=160)


def train(split: int) -> tuple[str, ...]:
    """The training, as a verb's words."""
    return ("train", "demo", "--dataset", _NAME, "--split", str(split), *SMALL)


@dataclass
class Step:
    """One thing that must hold."""

    what: str
    held: bool
    found: str
    seconds: float


@dataclass
class Rehearsal:
    """What was done so far. A step that fails does not end the others, unless they need it."""

    site: Cluster
    videos: Path
    steps: list[Step] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)

    def all(self, quick: bool) -> None:
        """Every step, in order; `quick` leaves out the sweep and the second split."""
        self.do("tavlad site check", self.check)
        self.do("tavlad pack, as a job", self.pack)
        self.do("tavlad train, split 1, two workers on two hosts", self.train_by_verb)
        if not quick:
            self.do("ray job submit ... ray_jobs.train, split 2", self.train_plainly)
            self.do("tavlad tune, as a job", self.tune)
        self.do("tavlad evaluate, as a job", self.evaluate)
        self.do("tavlad pull and predict, at the desk", self.use)
        self.do("train again: the worker host dies and is replaced", self.train_through_a_death)

    def do(self, what: str, step: Callable[[], str]) -> None:
        """One step, timed; an AssertionError is what did not hold."""
        _OUT.print(f"{what} ...", markup=False)
        began = time.monotonic()
        try:
            held, found = True, step()
        except (AssertionError, ValueError, KeyError) as error:
            held, found = False, str(error).strip()[-3000:]
        self.steps.append(Step(what, held, found, time.monotonic() - began))
        _OUT.print(f"  {'held' if held else 'DID NOT HOLD'}: {found}", markup=False)

    def check(self) -> str:
        """All of the site's checks, with the recipe's needs."""
        said = self.site.tavlad(
            "site", "check", str(self.site.site), "--recipe", "demo", "--set", "resources.workers=2"
        )
        checks = said.document["checks"]
        assert all(each["fine"] for each in checks), checks
        return f"{len(checks)} checks passed"

    def pack(self) -> str:
        """Rendered videos become a set in the store's bucket."""
        words = ("--name", _NAME, "--layout", "table", "--splits", str(self.videos / "videos.csv"))
        small = ("--num-frames", "8", "--short-side", "96", "--shard-megabytes", "0.5")
        document = self.site.tavlad("pack", str(self.videos), *words, *small).document
        assert document["rejected"] == []
        return f"{document['clips']} clips"

    def train_by_verb(self) -> str:
        """Undisturbed: what the disturbed one is compared with."""
        said = self.site.tavlad(*train(1))
        (run,) = self.site.ask("runs")
        self.weights = self.site.ask("weights", run)
        hosts = self.site.ask("hosts-of-ranks")
        assert len(hosts) == 2, f"all ranks were on {hosts}"
        document = said.document
        return f"{document['name']} version {document['version']}, ranks on {' and '.join(hosts)}"

    def train_plainly(self) -> str:
        """The documented command, from a checkout."""
        done = self.site.plain_job("python", "-m", "ray_jobs.train", *train(2)[1:])
        assert done.code == 0, done.out + done.err
        (registered,) = re.findall(rf"registered (tavlad-{_NAME}-split2 version \d+)", done.out)
        return registered

    def tune(self) -> str:
        """Two trials, and the better one in full."""
        space = self.site.folder / "space.toml"
        space.write_text(SPACE)
        words = ("tune", "demo", "--dataset", _NAME, "--space", str(space), "--search", "grid", "--scheduler", "none")
        tiny = ("--set", "stage1.epochs=2", "--set", "stage2.epochs=1", *SMALL[6:])
        document = self.site.tavlad(*words, *tiny).document
        assert document["trials"] == 2, document
        return f"best of 2 trials: {document['best']['changes']}, registered {document['finalists'][0]['version']}"

    def evaluate(self) -> str:
        """The registered model on the packed set."""
        scored = self.site.tavlad("evaluate", f"tavlad-{_NAME}-split1@best", "--dataset", _NAME).document
        return f"test top-1 {scored['test/top1']:.1%}"

    def use(self) -> str:
        """From outside the cluster: the model comes down and names an action."""
        model, video = self.site.folder / "model", next(iter(sorted(self.videos.rglob("*.mp4"))))
        pulled = self.site.tavlad("pull", f"tavlad-{_NAME}-split1@best", str(model))
        assert pulled.code == 0, pulled.err
        (first, *_) = self.site.tavlad("predict", str(model), str(video)).document["predictions"]
        return f"{video.name}: {first['action']}, {first['probability']:.0%}"

    def train_through_a_death(self) -> str:
        """Nothing is remembered of the training; it is submitted again and its worker host loses power."""
        assert self.weights, "there is no undisturbed training to compare with"
        seen = disturbed(self.site, train(1), "stage1-epoch00002", lambda: replace_worker(self.site))
        assert seen.weights == self.weights, "other weights than the undisturbed training's"
        return f"the same weights; next checkpoint {seen.seconds_to_recover:.0f} s after the death"


@dataclass(frozen=True)
class Disturbed:
    """How a training went whose cluster was harmed in the middle."""

    weights: dict[str, str]
    reached: str
    """Its newest checkpoint when the harm was done."""
    resumed: list[str]
    """Checkpoints that it went on from."""
    seconds_to_recover: float
    """From the harm to the next checkpoint."""
    output: str


def replace_worker(site: Cluster) -> None:
    """Power off the worker host; another one comes up in its place."""
    site.power_off("worker")
    site.add_worker("worker")


def disturbed(site: Cluster, words: tuple[str, ...], until: str, harm: Callable[[], Any]) -> Disturbed:
    """Run a training from nothing, do the harm when it has a checkpoint beyond `until`, and wait for its end."""
    site.ask("forget")
    log = site.folder / f"disturbed-{time.monotonic_ns()}.log"
    following = site.start(*words, log=log)
    before = site.ask("wait-for-checkpoint", until)
    assert before["checkpoint"] < "stage2", f"{before['checkpoint']}: too late to prove anything"
    began = time.time()
    harm()
    after = site.ask("wait-for-checkpoint", before["checkpoint"])
    code = following.wait(timeout=900)
    output = log.read_text()
    assert code == 0, f"the training ended with {code}: {output[-3000:]}"
    return Disturbed(
        weights=site.ask("weights", before["run"]),
        reached=before["checkpoint"],
        resumed=re.findall(r"going on from checkpoint (\S+)", output),
        seconds_to_recover=after["time"] - began,
        output=output,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__)
    parser.add_argument("--folder", type=Path, help="new folder for all it makes (default: a temporary one, kept)")
    parser.add_argument("--quick", action="store_true", help="without the sweep and the second split")
    chosen = parser.parse_args()
    if (reason := why_not()) is not None:
        _OUT.print(f"error: {reason}", markup=False)
        return 2
    folder: Path = chosen.folder or Path(tempfile.mkdtemp(prefix="tavlad-rehearsal-"))
    folder.mkdir(parents=True, exist_ok=True)
    videos = rendered(folder)
    began = time.monotonic()
    _OUT.print("hosts come up ...")
    with cluster(folder) as site:
        rehearsal = Rehearsal(site, videos)
        rehearsal.steps.append(Step("desk, store, head and worker up", True, "4 hosts", time.monotonic() - began))
        rehearsal.all(chosen.quick)
    table = Table("", "what", "seconds", "found", title=f"rehearsal in {folder}")
    for step in rehearsal.steps:
        table.add_row("held" if step.held else "FAILED", step.what, f"{step.seconds:.0f}", step.found)
    _OUT.print(table)
    return 0 if all(step.held for step in rehearsal.steps) else 1


def rendered(folder: Path) -> Path:
    """A few videos of each action, on the folder that all hosts see."""
    from shards.render import render_videos

    videos = folder / "videos"
    render_videos(videos, clips_per_action=6, seed=0)
    return videos


if __name__ == "__main__":
    sys.exit(main())
