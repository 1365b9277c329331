"""A trial on a real store, without Ray: resumed it is the same to the last bit, and it never sees a test clip."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest

from infra.site import Site
from ray_jobs.plan import plan_training
from ray_jobs.recipe import Recipe, load_recipe
from ray_jobs.space import Choice
from ray_jobs.sweep import Row, SweepOptions, SweepPlan, SweepStore, Trial
from ray_jobs.trial import TrialJob, run_trial
from shards.store import Store, open_store
from tests.fixtures_sets import PackedSet

pytestmark = pytest.mark.slow

CHANGES = {"model.gru_width": 5}


class _Killed(Exception):
    """What happens to a trial."""


def _recipe(store: Store, *changes: str) -> Recipe:
    tiny = ["model.trunk=resnet18", "model.weights=none", "model.num_clusters=2", "training.crop=32"]
    more = ["training.batch_size=4", "stage1.epochs=4", "training.precision=float32"]
    return load_recipe("demo", [*tiny, *more, *changes], store.uri)


def _job(site: Site, recipe: Recipe) -> TrialJob:
    training, _ = plan_training(site, recipe, 1)
    dimensions = (Choice(field="model.gru_width", values=(5, 6)),)
    sweep = SweepPlan(training=training, dimensions=dimensions, options=SweepOptions(search="grid"), weights="none")
    return TrialJob(sweep=sweep, use_features=True)


def _run(job: TrialJob, until: int = 99) -> list[Row]:
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        if len(rows) == until:
            raise _Killed

    if until <= 4:
        with pytest.raises(_Killed):
            run_trial(job, CHANGES, report)
    else:
        run_trial(job, CHANGES, report)
    return rows


def _but_speed(rows: list[Row]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "clips_per_second"} for row in rows]


def test_resumed_trial_is_an_undisturbed_one_and_a_finished_one_is_told_not_run(
    local_site: Site,
    packed: PackedSet,
) -> None:
    job = _job(local_site, _recipe(packed.store))
    store, trial_id = SweepStore(local_site, job.sweep.name), job.sweep.trial_id(CHANGES)
    undisturbed = _run(job)
    assert [row["epoch"] for row in undisturbed] == [1, 2, 3, 4]
    store.checkpoints(trial_id).remove_all()
    assert _but_speed(_run(job, until=2)) == _but_speed(undisturbed[:2])
    assert store.checkpoints(trial_id).names() == ["stage1-epoch00002"]
    resumed = _run(job)
    assert _but_speed(resumed) == _but_speed(undisturbed)
    assert resumed[:2] != undisturbed[:2], "the first two epochs are those of the interrupted trial, speed and all"

    assert store.finish(Trial(id=trial_id, changes=CHANGES, state="finished", rows=resumed))
    assert not store.checkpoints(trial_id).names()
    assert not store.finish(Trial(id=trial_id, changes=CHANGES, state="stopped", rows=[]))
    assert _run(job) == resumed
    assert not store.checkpoints(trial_id).names(), "nothing was trained"


def test_trial_ends_at_the_rung_by_itself_and_goes_on_from_there(local_site: Site, packed: PackedSet) -> None:
    job = _job(local_site, _recipe(packed.store, "training.seed=3"))
    store = SweepStore(local_site, job.sweep.name).checkpoints(job.sweep.trial_id(CHANGES))
    undisturbed = _run(job)
    store.remove_all()
    at_rung = _run(replace(job, rung=2))
    assert _but_speed(at_rung) == _but_speed(undisturbed[:2])
    assert store.names() == ["stage1-epoch00002"]
    assert _run(replace(job, rung=2)) == at_rung, "told, not trained"
    assert store.names() == ["stage1-epoch00002"]
    # Earlier versions recorded a trial that was stopped at the rung as one that is over.
    stopped = Trial(id=job.sweep.trial_id(CHANGES), changes=CHANGES, state="stopped", rows=at_rung)
    content = json.dumps(dataclasses.asdict(stopped)).encode()
    open_store(f"{local_site.sweeps_uri}/{job.sweep.name}", local_site.s3).write(f"trials/{stopped.id}.json", content)
    on = _run(job)
    assert on[:2] == at_rung
    assert _but_speed(on) == _but_speed(undisturbed)


def test_trial_never_reads_a_test_clip(local_site: Site, packed: PackedSet, tmp_path: Any) -> None:
    """The set without its test clips: their bytes are damaged, their rows are left."""
    copy = open_store(str(tmp_path / "set"))
    for path in packed.store.list():
        copy.write(path, packed.store.read(path))
    clips = packed.index.clips(1, "test")
    for row in range(len(clips)):
        place = clips.place(row)
        content = bytearray(copy.read(place.shard))
        content[place.offset : place.offset + place.length] = bytes(place.length)
        copy.write(place.shard, bytes(content))
    # Another seed, so that nothing of the other test's features or codebooks is found; nothing on the node either.
    recipe = _recipe(copy, "training.seed=7", "resources.disk_cache=0")
    assert len(_run(_job(local_site, recipe))) == 4
