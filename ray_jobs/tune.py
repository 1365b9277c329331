"""tavlad tune: many short trainings on shared features, compared by held-out clips; then the best ones in full.

Ray Tune runs the trials: all of them to the rung, then those that go on. What is known of them is ours
(`ray_jobs/sweep.py`), so that a sweep that was killed goes on whatever Ray Tune remembers.
"""

import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from infra.site import Site, load_site
from ray_jobs.cluster import connect, require_room, result_of, room_for
from ray_jobs.codebook import build_untrained, codebook_of
from ray_jobs.console import Console
from ray_jobs.features import feature_set, fill_views, may_use_features
from ray_jobs.plan import digest_of_weights, open_set, plan_training
from ray_jobs.provenance import Codes, OtherCode, label, with_this_code
from ray_jobs.recipe import Recipe
from ray_jobs.register import RegisteredRun
from ray_jobs.space import Changes, Dimension, as_settings, extremes
from ray_jobs.sweep import SweepOptions, SweepPlan, SweepStore, Trial, going_on, is_over, ranked, sweep_in_use
from ray_jobs.sweep_progress import Listener, Progress, StopTrials, described
from ray_jobs.sweep_records import SweepRecords
from ray_jobs.sweep_search import (
    EPOCH_NAME,
    SCORE_NAME,
    known_configurations,
    optuna_search,
    require_optuna,
)
from ray_jobs.train import train
from ray_jobs.trial import TrialJob, run_trial, trial_loading
from ray_jobs.trial_group import Leftovers, run_trial_by_group
from shards.features import CENTRE_SLOT, FeatureSet
from shards.index import Index
from shards.order import num_steps
from shards.store import StoreUnreachable, arrow_filesystem
from shards.transforms import draw_slot
from tavlad.codebook import require_descriptors
from tavlad.errors import UserError
from tavlad.train import Diverged, StagePlan, epochs_read

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_STOP = 60.0
_GIGABYTE = 1_000_000_000
_DECIDES_FEATURES = (
    "model.trunk",
    "model.weights",
    "model.descriptor",
    "training.seed",
    "training.precision",
    "training.crop",
    "training.augment",
    "training.views",
    "training.num_views",
    "training.batch_size",
    "training.subset",
    "features.dtype",
    "stage1.epochs",
    "stage1.steps",
    "stage1.features",
    "stage1.trunk",
    "stage1.fc",
)
"""Fields that decide which features a trial reads: where one is a dimension, trials compute theirs on their way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """A sweep that is done."""

    plan: SweepPlan
    trials: list[Trial]
    """Best first."""
    finalists: list[RegisteredRun]
    """The best configurations, trained in both stages on the whole training part; of the same order."""
    run_url: str

    def document(self) -> dict[str, Any]:
        """What a script reads."""
        best = self.trials[0]
        return {
            "sweep": self.plan.name,
            "trials": len(self.trials),
            "stopped": sum(trial.state == "stopped" for trial in self.trials),
            "epochs": sum(trial.epochs for trial in self.trials),
            "best": {
                "trial": best.id,
                "changes": best.changes,
                "held_out_top1": best.rows[-1]["held_out/top1"] if best.rows else None,
            },
            "finalists": [done.document() for done in self.finalists],
            "run": self.run_url,
        }


def tune_recipe(
    site: Site,
    recipe: Recipe,
    split: int,
    dimensions: tuple[Dimension, ...],
    options: SweepOptions,
    console: Console,
    other_code: OtherCode = "refuse",
) -> Swept:
    """Search the space, then train, evaluate and register the best configurations.

    Started again it goes on where it was. Raises ValueError before any trial for a space that cannot be searched.
    """
    if recipe.training.decoder == "nvjpeg":
        raise UserError('training.decoder = "nvjpeg": trials read clips by libjpeg alone, so tune without it')
    training, index = plan_training(site, recipe, split)
    weights = digest_of_weights(site, recipe)
    asked = SweepPlan(training=training, dimensions=dimensions, options=options, weights=weights)
    plan = sweep_in_use(site, asked, other_code)
    if plan.options.search == "optuna":
        require_optuna()
    known = known_configurations(plan)
    job = _check(site, plan, index, known)
    connect(site, console.say)
    workers = max(options.workers_per_trial, recipe.resources.fewest_workers if options.finalists else 1)
    require_room(site, recipe.resources.asked(workers))
    console.heading(f"Sweep {plan.name}: {len(known) if known is not None else options.trials} trials")
    store = SweepStore(site, plan.name)
    codes = _codes(plan, known, store, other_code, console)
    with SweepRecords(site, plan, codes) as records:
        trials = _search(site, job, index, known, store, records, console)
        _show(plan, trials, console)
        records.conclude(trials)
        registered: list[RegisteredRun] = []
        for trial in _finalists(plan, trials):
            console.say(f"Finalist {len(registered) + 1} of {options.finalists}: {described(trial.changes)}")
            done = train(site, plan.recipe(trial.changes), split, console, other_code=other_code)
            assert done is not None
            registered.append(done)
            name = f"finalist{len(registered)}"
            records.parent.set_tags({f"{name}.trial": trial.id, f"{name}.training": done.plan.name})
            records.parent.log_metrics({f"{name}/test/top1": done.scores.top(1)}, step=0)
        records.finish()
        return Swept(plan=plan, trials=trials, finalists=registered, run_url=records.parent.url())


def _codes(
    plan: SweepPlan, known: list[Changes] | None, store: SweepStore, other_code: OtherCode, console: Console
) -> Codes:
    """The code that made the trials, this one included where some are left. UserError where that may not be."""
    codes = store.codes()
    total = len(known) if known is not None else plan.options.trials
    if not is_over(plan, store, None if known is None else {plan.trial_id(each) for each in known}, total or 0):
        codes = with_this_code(plan.name, codes, other_code)
        store.record_codes(codes)
    elif note := label(codes):
        console.say(f"  {note}")
    return codes


def _finalists(plan: SweepPlan, trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state != "diverged"][: plan.options.finalists]


def _check(site: Site, plan: SweepPlan, index: Index, known: list[Changes] | None) -> TrialJob:
    """Refuse what cannot be: each combination that is known, and the largest values of all dimensions together."""
    for changes in known or [extremes(plan.dimensions)]:
        recipe = plan.trial_recipe(changes)
        if recipe.stage1.epochs < 1:
            raise UserError("stage1.epochs = 0: trials train stage 1; give it epochs")
    seen = plan.held_out(index)
    base = plan.trial_recipe({})
    model, provenance = build_untrained(site, base, len(index.actions))
    _, _, height, width = feature_set(site, base, index, model, provenance, "last").shape
    fixed = not {each.field for each in plan.dimensions} & {"model.trunk", "training.crop", "training.subset"}
    num_train = len(seen.clips(plan.training.split, "train"))
    for changes in (known or [extremes(plan.dimensions)]) if fixed else []:
        recipe = plan.trial_recipe(changes)
        if recipe.model.has_vlad:
            require_descriptors(recipe.model, recipe.codebook, num_train, index.num_frames, height * width)
    return TrialJob(sweep=plan, use_features=may_use_features(base, base.stage1, model))


def _search(
    site: Site,
    job: TrialJob,
    index: Index,
    known: list[Changes] | None,
    store: SweepStore,
    records: SweepRecords,
    console: Console,
) -> list[Trial]:
    """Every trial of the sweep, best first; those that are over already are not run."""
    plan = job.sweep
    total = len(known) if known is not None else plan.options.trials
    assert total is not None
    ids = {plan.trial_id(changes) for changes in known} if known is not None else None
    progress = Progress(plan, store, records, console, total, ids)
    over = list(progress.over)
    are_there = len(over) + len(progress.waiting()) >= total
    ahead = _settle(plan, progress, total, console, is_news=False) if are_there else []
    if progress.over:
        console.say(f"  {len(progress.over)} trials are over already and are not repeated")
    if ahead or not are_there:
        _prepare(site, job, index, known, console)
    if not are_there:
        _run_to_rung(site, job, progress, console, known, store.started())
        ahead = _settle(plan, progress, total, console, is_news=True)
    if ahead:
        _run(site, job, progress, console, [trial.changes for trial in ahead])
    for trial_id in over:
        records.end(progress.over[trial_id])
    store.tidy()
    if not progress.over:
        error = next(iter(progress.failed.values()), RuntimeError("no trial came to its end"))
        kind = UserError if isinstance(error, UserError) else RuntimeError
        raise kind(f"every trial failed, the first one with: {error}")
    if progress.failed:
        console.say(f"  {len(progress.failed)} trials failed; the same command tries them again")
    return ranked(list(progress.over.values()))


def _run_to_rung(
    site: Site,
    job: TrialJob,
    progress: Progress,
    console: Console,
    known: list[Changes] | None,
    started: dict[str, Changes],
) -> None:
    """Every trial that is not there yet to the rung, or to its end where there is none."""
    plan, job = job.sweep, replace(job, rung=job.sweep.rung)
    there = progress.over.keys() | {trial.id for trial in progress.waiting()}
    left = [changes for key, changes in started.items() if key not in there]
    if known is not None:
        left = [changes for changes in known if plan.trial_id(changes) not in there]
        # Those that have checkpoints first.
        left.sort(key=lambda changes: plan.trial_id(changes) not in started)
    if left:
        _run(site, job, progress, console, left)
    trials = [*progress.over.values(), *progress.waiting()]
    more = (plan.options.trials or 0) - len(trials) - len(progress.failed)
    if known is None and more > 0:
        _run(site, job, progress, console, optuna_search(plan, trials), more)


def _settle(plan: SweepPlan, progress: Progress, total: int, console: Console, *, is_news: bool) -> list[Trial]:
    """Decide which trials go on from the rung; the others are over. Those that have yet to go on."""
    if plan.rung is None:
        return []
    waiting = progress.waiting()
    trials = [*progress.over.values(), *waiting]
    ahead = progress.settle(going_on(plan, trials, max(total, len(trials))), is_news)
    if ahead or (waiting and is_news):
        console.say(f"  epoch {plan.rung}: {len(ahead)} of {len(waiting)} trials go on, the best so far")
    return ahead


def _prepare(site: Site, job: TrialJob, index: Index, known: list[Changes] | None, console: Console) -> None:
    """What trials share: a codebook for each K, and the features of what they will be shown."""
    plan = job.sweep
    recipes = {_codebook_key(recipe): recipe for recipe in map(plan.trial_recipe, known or []) if recipe.model.has_vlad}
    if recipes:
        sizes = ", ".join(str(size) for size in sorted({recipe.model.num_clusters for recipe in recipes.values()}))
        console.say(f"  codebooks of the clips that trials learn from: K = {sizes}")
        needs = plan.training.recipe.resources
        task = _prepare_codebooks.options(num_cpus=1, num_gpus=min(1.0, needs.gpus_per_worker))
        result_of(task.remote(plan, list(recipes.values())))
    if not job.use_features or {each.field for each in plan.dimensions} & set(_DECIDES_FEATURES):
        return
    base = plan.trial_recipe({})
    model, provenance = build_untrained(site, base, len(index.actions))
    features = feature_set(site, base, index, model, provenance, base.stage1.feature_kind)
    wanted = _wanted_views(plan, base, index)
    _check_budget(base, features, len(wanted))
    console.say(f"  features at {features.store.uri}")
    computed = fill_views(site, base, features, index, wanted, console)
    console.say(f"  {len(wanted)} clip views for all trials together, {computed} of them computed now")


def _wanted_views(plan: SweepPlan, recipe: Recipe, index: Index) -> set[tuple[int, int]]:
    """Row in the index and slot of everything that stage 1 of any trial will be shown."""
    seen, split = plan.held_out(index), plan.training.split
    rows = {key: row for row, key in enumerate(index.clips_table.keys())}
    train = seen.clips(split, "train").keys()
    options = trial_loading(recipe, training=True)
    steps = num_steps(len(train), options.batch_size)
    stage = StagePlan(number=1, stage=recipe.stage1, training=recipe.training)
    held = seen.clips(split, "test").keys()
    wanted = {(rows[key], CENTRE_SLOT) for key in held}
    if not options.augment:
        return wanted | {(rows[key], CENTRE_SLOT) for key in train}
    for epoch in epochs_read(stage, steps):
        wanted |= {(rows[key], draw_slot(options.seed, epoch, key, options.num_views)) for key in train}
    return wanted


def _check_budget(recipe: Recipe, features: FeatureSet, num_views: int) -> None:
    gigabytes = num_views * features.entry_bytes / _GIGABYTE
    if gigabytes > recipe.features.budget_gigabytes:
        raise UserError(
            f"the features of {num_views} clip views would take {gigabytes:.1f} GB, and features.budget_gigabytes is "
            f"{recipe.features.budget_gigabytes:g}: raise it, lower training.num_views, or let trials learn from "
            'frames with stage1.features = "never"'
        )


def _codebook_key(recipe: Recipe) -> tuple[Any, ...]:
    flat = recipe.flat()
    names = [name for name in flat if name.startswith(("codebook.", "training."))]
    more = ["model.trunk", "model.weights", "model.descriptor", "model.num_clusters", "model.descriptor_pca"]
    return tuple(flat[name] for name in (*more, *names))


@ray.remote(max_calls=1)  # its process ends, and gives the memory of the model and of k-means back
def _prepare_codebooks(plan: SweepPlan, recipes: list[Recipe]) -> None:
    """The first one stores the sample of maps that the others of its trunk are made of."""
    site = load_site(plan.training.site_name)
    for recipe in recipes:
        store, index = open_set(site, plan.training.dataset_uri, recipe)
        model, provenance = build_untrained(site, recipe, len(index.actions))
        codebook_of(site, recipe, plan.training.split, plan.held_out(index), store, model, provenance)


def _run(
    site: Site,
    job: TrialJob,
    progress: Progress,
    console: Console,
    search: list[Changes] | Searcher,
    num_samples: int = 1,
) -> None:
    """Run trials until all are over or at the rung. Ctrl-C stops them, says how things stand, and is raised again."""
    configurations = search if isinstance(search, list) else []

    def changes_of(config: dict[str, Any]) -> Changes:
        return configurations[config["number"]] if "number" in config else dict(config)

    stopper = StopTrials()
    tuner = _tuner(site, job, search, num_samples, Listener(progress, changes_of), stopper)
    # Fitting blocks, and takes Ctrl-C to itself in a main thread: it runs in another while this one shows what happens.
    with ThreadPoolExecutor(1, thread_name_prefix="ray-tune") as executor:
        fitting = executor.submit(tuner.fit)
        try:
            _show_until(fitting, progress, console, Leftovers(job.sweep.options.workers_per_trial))
        except KeyboardInterrupt:
            progress.stopping = True
            console.say("stopping the trials ...")
            stopper.ask()
            wait_for([fitting], timeout=_SECONDS_TO_STOP)
            over = ranked(list(progress.over.values()))
            if over and over[0].rows:
                top1 = over[0].rows[-1]["held_out/top1"]
                console.say(f"best so far: held-out {top1:.1%} with {described(over[0].changes)}")
            console.say(f"{len(over)} trials are over; the same command goes on with the others from their checkpoints")
            raise
    fitting.result()


def _show_until(fitting: "Future[Any]", progress: Progress, console: Console, leftovers: Leftovers) -> None:
    with console.live_table() as draw:
        while True:
            done, _ = wait_for([fitting], timeout=_SECONDS_BETWEEN_LOOKS)
            draw(*progress.table())
            leftovers.remove()
            if done:
                return


def _tuner(
    site: Site,
    job: TrialJob,
    search: list[Changes] | Searcher,
    num_samples: int,
    listener: Listener,
    stopper: StopTrials,
) -> tune.Tuner:
    plan = job.sweep
    resources = plan.training.recipe.resources
    needs, at_once = {"cpu": resources.cpus_per_worker, "gpu": resources.gpus_per_worker}, plan.options.at_once
    in_groups = plan.options.workers_per_trial > 1
    if in_groups:  # the workers ask for what they need by themselves, and Ray Tune must not start more than fit
        per_trial = [each * plan.options.workers_per_trial for each in needs.values()]
        # A byte, because Ray Tune refuses to run what needs nothing.
        needs, at_once = {"memory": 1.0}, at_once or room_for(*per_trial)
    filesystem, path = arrow_filesystem(f"{site.sweeps_uri}/{plan.name}/ray", site.s3)
    configurations = search if isinstance(search, list) else None

    def trainable(config: dict[str, Any]) -> None:
        changes = configurations[config["number"]] if configurations is not None else dict(config)
        _run_in_tune(job, changes)

    return tune.Tuner(
        tune.with_resources(trainable, needs),
        param_space=None if configurations is None else {"number": tune.grid_search(list(range(len(configurations))))},
        tune_config=tune.TuneConfig(
            search_alg=None if isinstance(search, list) else search,
            num_samples=num_samples,
            max_concurrent_trials=at_once,
            reuse_actors=not in_groups,  # a group ends with its trial's process
        ),
        run_config=tune.RunConfig(
            # A name used twice would silently resume what Ray Tune remembers.
            name=uuid.uuid4().hex,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=resources.max_restarts),
            callbacks=[listener],
            stop=stopper,
            verbose=0,
        ),
    )


def _run_in_tune(job: TrialJob, changes: Changes) -> None:
    """A trial's process: rows become Ray Tune's reports."""
    epoch = 0

    def report(row: dict[str, Any]) -> None:
        nonlocal epoch
        epoch = row["epoch"]
        tune.report({EPOCH_NAME: epoch, SCORE_NAME: row["held_out/score"], "row": row})

    try:
        (run_trial if job.sweep.options.workers_per_trial == 1 else run_trial_by_group)(job, changes, report)
    except Diverged as error:  # another try would come to the same
        tune.report({EPOCH_NAME: epoch + 1, SCORE_NAME: -1.0, "diverged": str(error)})
    except StoreUnreachable:  # later it may answer
        raise
    except UserError as error:
        tune.report({EPOCH_NAME: epoch + 1, SCORE_NAME: -1.0, "refused": str(error)})


def _show(plan: SweepPlan, trials: Sequence[Trial], console: Console) -> None:
    fields = [each.field for each in plan.dimensions]
    rows = [
        [
            trial.id[:6],
            trial.state,
            str(trial.epochs),
            f"{trial.rows[-1]['held_out/top1']:.1%}" if trial.rows else "",
            f"{trial.rows[-1]['held_out/loss']:.3f}" if trial.rows else "",
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in trial.changes.values()),
        ]
        for trial in trials[:10]
    ]
    console.table(["trial", "state", "epochs", "held-out", "loss", *fields], rows, "The best trials")
    if trials[0].state != "diverged":
        console.say(f"  the best one's settings: {as_settings(trials[0].changes)}")
