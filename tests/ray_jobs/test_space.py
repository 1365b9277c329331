"""What a sweep cannot search is refused before anything starts; what it searches is a function of space and seed."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_jobs.plan import TrainingPlan
from ray_jobs.recipe import load_recipe
from ray_jobs.space import Choice, Range, as_settings, changed, grid, load_space, parse_space
from ray_jobs.sweep import SweepOptions, SweepPlan, Trial, going_on, ranked, selection_score
from ray_jobs.sweep_search import domains, known_configurations, optuna_search
from tavlad.codebook import require_descriptors
from tavlad.config import CodebookConfig, ModelConfig
from tavlad.metrics import Scores

RECIPE = load_recipe("demo", ["stage1.epochs=9"], "set")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage1.lr = [-0.1]", r"mine\.toml: stage1\.lr = -0\.1: must be above 0"),
        ("stage1.lr = { low = -1.0, high = 1.0 }", r"stage1\.lr = -1\.0: must be above 0"),
        ('stage1.lr = { low = 0.0, high = 1.0, scale = "log" }', "for bounds above 0"),
        ("stage1.lr = { low = 0.1, high = 0.01 }", "low must be below high"),
        ("stage1.lr = { low = 0.1 }", "a range has low and high"),
        ('stage1.lr = ["fast"]', "stage1.lr = 'fast': must be of type float"),
        ("stage1.rate = [0.1]", r"stage1\.rate is no field of a recipe"),
        ("model.num_cluster = [4]", r"did you mean model\.num_clusters\?"),
        ("model.num_clusters = [4.5]", "must be of type int"),
        ("model.num_clusters = { low = 4.5, high = 9 }", "must be whole numbers"),
        ("model.num_clusters = [0]", "must be at least 1"),
        ("model.num_clusters = [4, 4]", "none twice"),
        ("model.num_clusters = 4", "give a list of values"),
        ("model.attention = { low = 1, high = 2 }", "is not a number: list its values"),
        ("stage2.lr = [0.1]", "trials train stage 1 only"),
        ("resources.workers = [1, 2]", "does not change what is computed"),
        ("", "the space has no dimension"),
        ("stage1.lr = ", "is not TOML"),
    ],
)
def test_impossible_spaces_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_space(path, RECIPE)


def test_a_configuration_as_settings_is_the_same_recipe() -> None:
    changes = {"stage1.lr": 1 / 3 * 1e-5, "model.num_clusters": 5, "model.trunk": "resnet18", "training.augment": False}
    words = shlex.split(as_settings(changes))
    assert words[::2] == ["--set"] * len(changes)
    settings = ["stage1.epochs=9", *words[1::2]]
    assert load_recipe("demo", settings, "set") == changed(RECIPE, changes) != RECIPE


def test_codebook_with_more_words_than_descriptors_is_refused() -> None:
    model, config = ModelConfig(num_clusters=41), CodebookConfig(frames=5000, frames_per_video=2)
    with pytest.raises(ValueError, match=r"num_clusters = 41 is more than the 40 descriptors that 5 training clips"):
        require_descriptors(model, config, num_clips=5, num_frames=8, num_places=4)
    require_descriptors(model, config, num_clips=6, num_frames=8, num_places=4)


def test_what_the_model_does_not_have_is_not_searched() -> None:
    for recipe, fields in (("actionvlad", {"stage1.lr", "model.num_clusters"}), ("small", {"stage1.lr"})):
        loaded = load_recipe(recipe, dataset="set")
        assert {each.field for each in load_space(None, loaded)} == fields
        with pytest.raises(ValueError, match=r'model\.gru_width cannot be a dimension: .* model\.temporal = "'):
            parse_space({"model": {"gru_width": [8, 16]}}, loaded)
    both = {"model": {"gru_width": [8, 16], "temporal": ["gru", "sum"]}}
    assert len(parse_space(both, load_recipe("actionvlad", dataset="set"))) == 2


def test_default_space_is_that_of_the_help() -> None:
    space = load_space(None, RECIPE)
    assert space[0] == Range(field="stage1.lr", low=1e-4, high=3e-2, scale="log", points=3)
    assert space[1:] == (
        Choice(field="model.num_clusters", values=(16, 32, 64, 128)),
        Choice(field="model.gru_width", values=(128, 256, 512)),
    )
    assert len(grid(space)) == 36


def test_grid_of_a_log_range_is_even_in_the_logarithm_and_has_both_ends() -> None:
    space = parse_space({"stage1": {"lr": {"low": 1e-4, "high": 1e-2, "scale": "log", "points": 3}}}, RECIPE)
    assert [each["stage1.lr"] for each in grid(space)] == [1e-4, 1e-3, 1e-2]
    with pytest.raises(ValueError, match="a grid needs values"):
        grid(parse_space({"stage1": {"lr": {"low": 1e-4, "high": 1e-2}}}, RECIPE))


def _plan(search: Any = "random", trials: int | None = 8, scheduler: Any = "halving", **changes: Any) -> SweepPlan:
    recipe = changed(RECIPE, changes)
    training = TrainingPlan(
        site_name="local",
        recipe=recipe,
        split=1,
        dataset_uri="set",
        dataset_name="set",
        dataset_fingerprint="f",
        name="training",
        uri="run",
    )
    options = SweepOptions(search=search, trials=trials, scheduler=scheduler)
    return SweepPlan(training=training, dimensions=load_space(None, recipe), options=options, weights="w")


def test_more_trials_are_the_same_and_some_more() -> None:
    few, many = known_configurations(_plan(trials=8)), known_configurations(_plan(trials=20))
    assert few is not None
    assert many is not None
    assert many[:8] == few
    assert len({_plan().trial_id(changes) for changes in many}) == 20
    assert all(1e-4 <= changes["stage1.lr"] <= 3e-2 for changes in many)
    assert known_configurations(_plan(trials=8, **{"training.seed": 1})) != few
    assert _plan(trials=8).name == _plan(trials=20).name, "so that the longer sweep finds the shorter one's trials"


def test_grid_comes_in_an_order_of_the_seed_and_whole() -> None:
    configurations = known_configurations(_plan("grid", None))
    assert configurations is not None
    assert configurations != grid(load_space(None, RECIPE))
    assert sorted(map(repr, configurations)) == sorted(map(repr, grid(load_space(None, RECIPE))))


def test_space_smaller_than_the_trials_is_refused() -> None:
    plan = SweepPlan(
        training=_plan().training,
        dimensions=(Choice(field="model.gru_width", values=(1, 2)),),
        options=SweepOptions(trials=3),
        weights="w",
    )
    with pytest.raises(ValueError, match="only about 2 different configurations"):
        known_configurations(plan)


def test_whole_numbers_are_drawn_up_to_the_bound() -> None:
    (dimension,) = parse_space({"model": {"gru_width": {"low": 2, "high": 3}}}, RECIPE)
    domain = domains([dimension])["model.gru_width"]
    assert {int(domain.sample()) for _ in range(50)} == {2, 3}


def test_trial_is_stage_1_of_the_recipe_it_changes() -> None:
    plan = _plan()
    trial = plan.trial_recipe({"stage1.lr": 0.002})
    assert (trial.stage1.lr, trial.stage2.epochs, trial.training.evaluate_every) == (0.002, 0, 1)
    assert plan.recipe({"stage1.lr": 0.002}).stage2 == RECIPE.stage2
    assert _plan(**{"stage2.lr": 0.5}).name == plan.name, "trials know nothing of stage 2"
    assert _plan(**{"stage1.decay_every": 2}).name != plan.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "grid", "trials": 3}, "leave --trials out"),
        ({"search": "random"}, "needs --trials"),
        ({"trials": 3, "share": 1.0}, "--held-out 1.0"),
        ({"trials": 0}, "--trials 0"),
    ],
)
def test_options_that_make_no_sweep_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepOptions(**options)


def _scores(*probability_of_right: float) -> Scores:
    right = np.array(probability_of_right)
    keys = tuple(map(str, range(len(right))))
    return Scores(keys=keys, labels=np.zeros(len(right), dtype=np.int64), probabilities=np.stack([right, 1 - right], 1))


def test_one_more_right_clip_outweighs_any_loss_and_loss_decides_between_equals() -> None:
    certain, unsure, hopeless = _scores(0.9, 0.9, 0.4), _scores(0.6, 0.6, 0.4), _scores(0.51, 0.51, 0.51)
    assert selection_score(hopeless) > selection_score(certain) > selection_score(unsure)
    assert selection_score(_scores(0.9, 0.9, 1e-30)) > selection_score(_scores(0.9, 0.49, 0.49))


def _trial(name: str, *scores: float, state: Any = "finished") -> Trial:
    rows = [{"epoch": epoch, "held_out/score": score} for epoch, score in enumerate(scores, 1)]
    return Trial(id=name, changes={}, state=state, rows=rows)


def test_trials_stopped_early_and_diverged_ones_rank_last() -> None:
    trials = [
        _trial("d", 0.99, state="diverged"),
        _trial("s", 0.9, state="stopped"),
        _trial("b", 0.5, 0.6),
        _trial("a", 0.9, 0.3),
    ]
    assert [trial.id for trial in ranked(trials)] == ["b", "a", "s", "d"]


@pytest.mark.parametrize(("epochs", "rung"), [(1, None), (2, 1), (4, 1), (9, 1), (10, 2), (14, 2), (100, 20)])
def test_rung_is_at_a_fifth_of_the_epochs(epochs: int, rung: int | None) -> None:
    assert _plan(**{"stage1.epochs": epochs}).rung == rung
    assert _plan(scheduler="none", **{"stage1.epochs": epochs}).rung is None


def test_rung_is_that_of_the_longest_trial() -> None:
    dimensions = (Choice(field="stage1.epochs", values=(5, 30, 10)),)
    assert (
        SweepPlan(training=_plan().training, dimensions=dimensions, options=SweepOptions(trials=3), weights="").rung
        == 6
    )


def test_best_quarter_at_the_rung_goes_on_whatever_came_later_and_in_whatever_order() -> None:
    plan = _plan(**{"stage1.epochs": 10})
    trials = [_trial(f"{number:02}", 0.9, number / 100, state="waiting") for number in range(9)]
    trials[8] = _trial("08", 0.9, 0.08, 0.001)
    trials += [_trial("d", 0.99, state="diverged"), _trial("short", 0.07)]
    assert going_on(plan, trials, 12) == {"08", "07", "short"}
    assert going_on(plan, trials[::-1], 12) == {"08", "07", "short"}
    assert going_on(plan, trials[:8], 12) == {"07", "06", "05"}, "three of twelve, of which four are missing"
    more = dataclasses.replace(plan, options=dataclasses.replace(plan.options, finalists=4))
    assert len(going_on(more, trials, 12)) == 4


def test_optuna_goes_on_from_the_trials_that_are_over() -> None:
    """Told that wide GRUs are good, TPE suggests them; told nothing, it draws."""
    pytest.importorskip("optuna")
    dimensions = (Range(field="model.gru_width", low=1, high=1000, whole=True),)
    plan = SweepPlan(
        training=_plan().training, dimensions=dimensions, options=SweepOptions(search="optuna", trials=60), weights="w"
    )
    assert known_configurations(plan) is None
    over = [
        Trial(
            id=str(width),
            changes={"model.gru_width": width},
            state="finished",
            rows=[{"epoch": 1, "held_out/score": width / 1000}],
        )
        for width in range(10, 1000, 20)
    ]
    search: Any = optuna_search(plan, over)
    suggested = [search.suggest(f"new{number}")["model.gru_width"] for number in range(9)]
    assert sorted(suggested)[4] > 700
