"""Which configurations a sweep tries: Ray Tune's own search."""

import importlib.util
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.variant_generator import generate_variants

from ray_jobs.space import Changes, Choice, Dimension, grid
from ray_jobs.sweep import SweepPlan, Trial
from tavlad.errors import UserError

SCORE_NAME, EPOCH_NAME = "score", "epoch"
"""What Ray Tune knows a row's score and epoch by."""


def known_configurations(plan: SweepPlan) -> list[Changes] | None:
    """All configurations of a grid or a random search, no two of them the same; None where they follow from results.

    A function of the space and the seed; more trials of a random search are the same ones and some more. They come in
    an order drawn by the seed, so that the best so far is that of the whole space and not of its first corner.
    """
    if plan.options.search == "optuna":
        return None
    if plan.options.search == "grid":
        configurations = grid(plan.dimensions)
        random.Random(plan.seed).shuffle(configurations)
        return configurations
    assert plan.options.trials is not None
    return _draw(plan.dimensions, plan.options.trials, plan.seed)


def _draw(dimensions: Sequence[Dimension], count: int, seed: int) -> list[Changes]:
    generator = np.random.RandomState(seed)
    drawn: dict[str, Changes] = {}
    for _ in range(_MOST_DRAWS * count):
        ((_, changes),) = generate_variants(domains(dimensions), random_state=generator)
        plain = {name: _plain(value) for name, value in changes.items()}
        drawn.setdefault(repr(plain), plain)
        if len(drawn) == count:
            return list(drawn.values())
    raise UserError(
        f"the space has only about {len(drawn)} different configurations, fewer than --trials {count}: "
        "ask for fewer, or --search grid"
    )


_MOST_DRAWS = 200  # for each trial, before a space counts as exhausted


def _plain(value: Any) -> Any:
    """Without numpy's types; floats as short as they are told apart."""
    value = value.item() if hasattr(value, "item") else value
    return float(f"{value:.6g}") if isinstance(value, float) else value


def domains(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """The space in Ray Tune's terms."""
    space: dict[str, Any] = {}
    for each in dimensions:
        if isinstance(each, Choice):
            space[each.field] = tune.choice(list(each.values))
        elif each.whole:
            draw = tune.lograndint if each.scale == "log" else tune.randint
            space[each.field] = draw(int(each.low), int(each.high) + 1)
        else:
            space[each.field] = (tune.loguniform if each.scale == "log" else tune.uniform)(each.low, each.high)
    return space


def require_optuna() -> None:
    """ValueError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--search optuna needs Optuna: install it with `pip install 'tavlad[tune]'`")


def optuna_search(plan: SweepPlan, trials: Sequence[Trial]) -> Searcher:
    """TPE that knows the trials that are over or wait. Where there is a rung it learns from how all stood there."""
    require_optuna()
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        OptunaSearch.convert_search_space(domains(plan.dimensions)),
        metric=SCORE_NAME,
        mode="max",
        seed=plan.seed + len(trials),
        points_to_evaluate=[trial.changes for trial in trials] or None,
        evaluated_rewards=[trial.score_at(plan.rung) if plan.rung else trial.score for trial in trials] or None,
    )
