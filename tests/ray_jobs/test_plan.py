"""Under which name a training is found on a real store: by the first names, begun anew, of this code or of other."""

import dataclasses
import json
import uuid
from pathlib import Path

import pytest

from infra.site import Site
from ray_jobs.console import Console
from ray_jobs.plan import TrainingPlan, plan_training
from ray_jobs.provenance import UNKNOWN_CODE, Code, Codes, OtherCode, recorded, this_code
from ray_jobs.recipe import Recipe, change_recipe, load_recipe
from ray_jobs.space import Choice
from ray_jobs.sweep import Scheduler, State, SweepOptions, SweepPlan, SweepStore, Trial, is_over, sweep_in_use
from ray_jobs.train import train
from shards.store import S3Access, open_store
from tavlad.checkpoint import ModelCard
from tests.fixtures_sets import PackedSet

OTHER = Code(commit="b" * 40, is_dirty=False, sources="2" * 64)
CUT_OFF = "stage1-epoch00001-step000003"


@pytest.fixture
def site(local_s3: S3Access) -> Site:
    """The store alone: nothing here needs Ray or MLflow."""
    nowhere = {"ray_address": "127.0.0.1:9", "ray_dashboard": "http://127.0.0.1:9", "mlflow_uri": "http://127.0.0.1:9"}
    return Site(name="local", s3=local_s3, bucket="tavlad", **nowhere)


@pytest.fixture
def recipe(packed: PackedSet) -> Recipe:
    """A training that no other test has."""
    lr = int(uuid.uuid4().hex[:8], 16) * 1e-12
    return load_recipe("demo", ["model.weights=none", f"stage1.lr={lr}"], packed.store.uri)


def _save(site: Site, plan: TrainingPlan, checkpoint: str, codes: Codes | None, folder: Path) -> None:
    """A checkpoint by these versions of the code; None: by one that did not record its code."""
    provenance = {"run": plan.name} | ({} if codes is None else {"code": recorded(codes)})
    card = ModelCard(
        model=plan.recipe.model,
        actions=("a", "b"),
        num_frames=4,
        short_side=32,
        crop=32,
        precision="float32",
        provenance=provenance,
    )
    directory = folder / uuid.uuid4().hex
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(dataclasses.asdict(card)))
    plan.checkpoints(site).save(checkpoint, directory)


def _first(site: Site, plan: TrainingPlan) -> TrainingPlan:
    """The plan as the first version of names had it."""
    digits = plan.recipe.first_fingerprint(set=plan.dataset_fingerprint, weights="none", split=1, format=2)
    assert digits is not None
    name = f"{plan.name.rpartition('-')[0]}-{digits[:10]}"
    return dataclasses.replace(plan, name=name, uri=f"{site.runs_uri}/{name}")


@pytest.mark.parametrize("is_done", [True, False])
def test_training_that_has_a_first_name_is_found_by_it(
    site: Site, recipe: Recipe, tmp_path: Path, is_done: bool
) -> None:
    plan, _ = plan_training(site, recipe, 1)
    first = _first(site, plan)
    assert first.name != plan.name
    _save(site, first, plan.last_checkpoint if is_done else CUT_OFF, None, tmp_path)
    found, _ = plan_training(site, recipe, 1)
    assert found == first
    assert found.codes(site) == (UNKNOWN_CODE,)


@pytest.mark.parametrize("codes", [(OTHER,), None])
def test_training_that_other_code_began_is_refused_before_anything_starts(
    site: Site, recipe: Recipe, tmp_path: Path, codes: Codes | None
) -> None:
    plan, _ = plan_training(site, recipe, 1)
    assert plan.codes(site) == ()
    _save(site, plan, CUT_OFF, codes, tmp_path)
    with pytest.raises(ValueError, match=rf"{plan.name} was cut off.* --resume-with-new-code .* --fresh "):
        train(site, recipe, 1, Console())


def test_newest_checkpoint_says_by_which_code_it_was_made(site: Site, recipe: Recipe, tmp_path: Path) -> None:
    plan, _ = plan_training(site, recipe, 1)
    _save(site, plan, CUT_OFF, (OTHER,), tmp_path)
    _save(site, plan, "stage1-epoch00002", (OTHER, this_code()), tmp_path)
    assert plan.codes(site) == (OTHER, this_code())


def test_training_begun_anew_is_another_one_which_is_found_from_then_on(
    site: Site, recipe: Recipe, tmp_path: Path
) -> None:
    def plan(other_code: OtherCode = "refuse") -> TrainingPlan:
        return plan_training(site, recipe, 1, other_code)[0]

    of_other = plan()
    assert plan("begin anew") == of_other, "nothing is there to leave aside"
    _save(site, of_other, of_other.last_checkpoint, (OTHER,), tmp_path)
    assert plan() == of_other, "done, it is used again"
    anew = plan("begin anew")
    assert (anew.name, anew.uri) == (f"{of_other.name}.2", f"{of_other.uri}.2")
    _save(site, anew, CUT_OFF, (this_code(),), tmp_path)
    assert plan() == plan("begin anew") == anew
    assert of_other.last_checkpoint in of_other.checkpoints(site).names(), "what was done stays"


@pytest.mark.parametrize("scheduler", ["none", "halving"])
def test_sweep_is_over_when_no_trial_is_left_to_train(site: Site, recipe: Recipe, scheduler: Scheduler) -> None:
    training, _ = plan_training(site, change_recipe(recipe, {"stage1": {"epochs": 10}}), 1)
    widths = (5, 6, 7, 8)
    plan = SweepPlan(
        training=training,
        dimensions=(Choice(field="model.gru_width", values=widths),),
        options=SweepOptions(search="grid", scheduler=scheduler),
        weights="none",
    )
    store = SweepStore(site, plan.name)
    ids = [plan.trial_id({"model.gru_width": width}) for width in widths]

    def trial(number: int, epochs: int, state: State) -> Trial:
        rows = [{"epoch": epoch + 1, "held_out/score": number / 10} for epoch in range(epochs)]
        return Trial(id=ids[number], changes={"model.gru_width": widths[number]}, state=state, rows=rows)

    assert not is_over(plan, store, set(ids), 4)
    for number in range(4):
        assert not is_over(plan, store, set(ids), 4)
        if scheduler == "halving":
            store.wait(trial(number, 2, "waiting"))
        else:
            store.finish(trial(number, 10, "finished"))
    assert is_over(plan, store, set(ids), 4) == (scheduler == "none"), "the best one at the rung is to go on"
    store.finish(trial(3, 10, "finished"))
    assert is_over(plan, store, set(ids), 4)
    assert not is_over(plan, store, set(ids) | {"another"}, 5)


def test_sweep_is_found_by_its_first_name_and_begun_anew_beside_it(site: Site, recipe: Recipe) -> None:
    training, _ = plan_training(site, recipe, 1)
    dimensions = (Choice(field="model.gru_width", values=(5, 6)),)
    plan = SweepPlan(training=training, dimensions=dimensions, options=SweepOptions(search="grid"), weights="none")
    changes = {"model.gru_width": 5}
    assert sweep_in_use(site, plan, "refuse") == plan

    first = dataclasses.replace(plan, is_first_name=True)
    assert first.name != plan.name
    assert first.trial_id(changes) != plan.trial_id(changes)
    store = SweepStore(site, first.name)
    store.start(first.trial_id(changes), changes)
    assert sweep_in_use(site, plan, "refuse") == first
    assert store.codes() == (UNKNOWN_CODE,)

    anew = sweep_in_use(site, plan, "begin anew")
    assert anew.name == f"{first.name}.2"
    assert sweep_in_use(site, plan, "refuse") == anew
    SweepStore(site, anew.name).record_codes((this_code(),))
    assert SweepStore(site, anew.name).codes() == (), "none of its trials is begun"
    assert open_store(site.sweeps_uri, site.s3).list(f"{first.name}/started/")
