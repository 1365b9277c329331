"""Which configurations a sweep tries, and which trials go on: Ray Tune's own search and early stopping."""

import importlib.util
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.variant_generator import generate_variants

from ray_jobs.space import Changes, Choice, Dimension, grid
from ray_jobs.sweep import SCORE, SweepPlan, Trial

SCORE_NAME, EPOCH_NAME = "score", "epoch"
"""What Ray Tune knows a row's score and epoch by."""

REDUCTION = 3
"""At each of ASHA's rungs about one of so many trials goes on, and each rung is so many times as far."""


def known_configurations(plan: SweepPlan) -> list[Changes] | None:
    """All configurations of a grid or a random search, no two of them the same; None where they follow from results.

    A function of the space and the seed; more trials of a random search are the same ones and some more. They come in
    an order drawn by the seed: early stopping compares a trial with those before it, and must not meet a whole corner
    of the space first.
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
    raise ValueError(
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
        raise ValueError("--search optuna needs Optuna: install it with `pip install 'tavlad[tune]'`")


def optuna_search(plan: SweepPlan, over: Sequence[Trial]) -> Searcher:
    """TPE that knows the trials that are over."""
    require_optuna()
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(
        OptunaSearch.convert_search_space(domains(plan.dimensions)),
        metric=SCORE_NAME,
        mode="max",
        seed=plan.seed + len(over),
        points_to_evaluate=[trial.changes for trial in over] or None,
        evaluated_rewards=[trial.score for trial in over] or None,
    )


def make_scheduler(plan: SweepPlan, epochs: int, over: Sequence[Trial]) -> TrialScheduler:
    """What stops trials early: ASHA that knows the trials that are over, or nothing."""
    if plan.options.scheduler == "none":
        return FIFOScheduler()
    return _Asha(epochs, over)


class _Asha(ASHAScheduler):
    """Rungs at about 1/9, 1/3 and all of the epochs; trials of earlier processes stand on them already."""

    def __init__(self, epochs: int, over: Sequence[Trial]) -> None:
        first = max(1, epochs // REDUCTION**2)
        super().__init__(
            time_attr=EPOCH_NAME,
            metric=SCORE_NAME,
            mode="max",
            max_t=epochs,
            grace_period=first,
            reduction_factor=REDUCTION,
            brackets=1,
        )
        (bracket,) = self._brackets
        for milestone, recorded in bracket._rungs:  # pyright: ignore[reportPrivateUsage]
            for trial in over:
                if trial.state == "diverged":
                    recorded[trial.id] = trial.score
                elif trial.epochs >= milestone:
                    row = next(row for row in trial.rows if row["epoch"] >= milestone)
                    recorded[trial.id] = float(row[SCORE])
