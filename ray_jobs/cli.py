"""The `tavlad` command: one verb a function; `cli_ending` says how it ends when a verb fails."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from infra.site import default_site
from ray_jobs import cli_jobs, cli_models
from ray_jobs.cli_ending import Verbs, tell
from ray_jobs.cli_settings import Settings
from ray_jobs.cli_settings import console as _console
from ray_jobs.cli_settings import hand_over as _hand_over
from ray_jobs.cli_settings import require_local as _require_local
from ray_jobs.cli_settings import site as _site
from ray_jobs.interrupts import interruptible
from tavlad.errors import UserError

app = typer.Typer(
    name="tavlad",
    cls=Verbs,
    help=(
        "Train video action recognition (TA-VLAD): pack videos, train in two stages, register, predict.\n\n"
        "Start with `tavlad demo`, or with `tavlad pack VIDEOS --name mine`, `tavlad train small --dataset mine`."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


SplitOption = Annotated[int, typer.Option(min=1, max=3, help="Split 1, 2 or 3.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field, such as stage1.lr=0.005.")
]
DatasetOption = Annotated[
    str | None, typer.Option(help="A packed set: name, s3:// URI or folder (instead of the recipe's).")
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume-with-new-code", help="Go on with what other code began and did not end (else refused)."),
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Leave aside what other code made, done or not, and begin anew beside it.")
]
RecipeArgument = Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that comes with tavlad.")]


@app.callback()
def settings(
    context: typer.Context,
    site: Annotated[
        str | None, typer.Option(help="Where to run: local, a site's name or its TOML file (else TAVLAD_SITE).")
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Do the verb in this process, on a machine of the cluster: submit no job.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Make the last line of stdout one JSON document.")] = False,
) -> None:
    """Options of every verb."""
    Settings.site_name = site or default_site()
    Settings.is_driver = here
    Settings.context = context
    Settings.json_output = json


@app.command()
def up() -> None:
    """Start the local services (S3, MLflow, Ray), or say that they run.

    Example: `tavlad up`
    """
    _require_local()
    site, console = _site(), _console()
    console.say(f"MLflow: {site.mlflow_uri}")
    console.say(f"S3:     {site.s3.endpoint_url}, bucket {site.bucket}")
    console.say(f"Ray:    {site.ray_address}, dashboard {site.ray_dashboard}")
    console.result({"mlflow": site.mlflow_uri, "s3": site.s3.endpoint_url, "ray": site.ray_address})


@app.command()
def down() -> None:
    """Stop the local services; data stay.

    Example: `tavlad down`
    """
    _require_local()
    from infra.local import down as stop

    stop()
    _console().result({"running": False})


@app.command()
def status() -> None:
    """Show which local services run, and where.

    Example: `tavlad --json status`
    """
    _require_local()
    from infra.local import status as look

    console, services = _console(), look()
    rows = [
        [each.name, "running" if each.running else "stopped", each.address or "", each.detail or ""]
        for each in services
    ]
    console.table(["service", "state", "address", "detail"], rows)
    console.result({each.name: {"running": each.running, "address": each.address} for each in services})


@app.command()
def prepare(
    name: Annotated[Literal["hmdb51", "ucf101"], typer.Argument(help="The data set.")],
    archive: Annotated[Path, typer.Argument(help="Its archive of videos: hmdb51_org.rar or UCF101.rar.")],
    folder: Annotated[Path, typer.Argument(help="Where videos/ and splits/ are put.")],
    splits: Annotated[
        Path | None, typer.Option(help="test_train_splits.rar or UCF101TrainTestSplits-RecognitionTask.zip.")
    ] = None,
) -> None:
    """Unpack HMDB51 or UCF101 as downloaded, and check that nothing is missing; docs/GUIDE.md says where they are.

    Example: `tavlad prepare hmdb51 hmdb51_org.rar hmdb51/ --splits test_train_splits.rar`
    """
    from ray_jobs.prepare import prepare as run

    console = _console()
    prepared = run(name, archive, folder, splits, console)
    console.result(
        {
            "videos": str(prepared.videos),
            "splits": None if prepared.splits is None else str(prepared.splits),
            "actions": prepared.num_actions,
            "clips": prepared.num_videos,
        }
    )


@app.command()
def pack(
    videos: Annotated[Path, typer.Argument(help="The folder of the videos.")],
    name: Annotated[str, typer.Option(help="Name of the set on the site.")],
    layout: Annotated[
        Literal["hmdb51", "ucf101", "folders", "table"], typer.Option(help="How videos and splits are given.")
    ] = "folders",
    splits: Annotated[
        Path | None, typer.Option(help="hmdb51, ucf101: folder of the split files; table: the CSV or Parquet file.")
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="s3:// URI or folder to pack into (instead of the site's bucket).")
    ] = None,
    pack_format: Annotated[
        Literal["frames", "video"],
        typer.Option("--format", help="JPEGs of the frames, or the files as they are."),
    ] = "frames",
    modality: Annotated[
        Literal["rgb", "flow", "difference"],
        typer.Option(help="What the frames show: the video, its optical flow, or differences of its frames."),
    ] = "rgb",
    num_frames: Annotated[int, typer.Option(help="Frames of a clip, uniform over time.")] = 25,
    short_side: Annotated[int, typer.Option(help="Pixels of a frame's short side, at most.")] = 256,
    jpeg_quality: Annotated[int, typer.Option(help="Of the packed frames, 1 to 100.")] = 90,
    shard_megabytes: Annotated[float, typer.Option(help="Size of a shard, about.")] = 64.0,
    seed: Annotated[int, typer.Option(help="Of the dealing to shards, and of the splits of a folder.")] = 0,
    max_rejected: Annotated[int, typer.Option(help="Videos that may fail to pack before the exit code says so.")] = 0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Pack again only what `tavlad verify` finds damaged in the finished set.")
    ] = False,
) -> None:
    """Pack labelled videos into a WebDataset shard set; killed and started again it does only what is missing.

    Examples:

    `tavlad pack videos/ --name mine`  (a folder per action)

    `tavlad pack hmdb51_org/ --name hmdb51 --layout hmdb51 --splits testTrainMulti_7030_splits/`

    `tavlad pack videos/ --name mine-flow --modality flow`  (for a second, motion stream)
    """
    _hand_over()  # before looking at the videos, which only the cluster may see
    from shards.datasets import scan
    from shards.plan import PackOptions

    video_set = scan(name, videos.absolute(), layout, splits, seed=seed)
    options = PackOptions(
        format=pack_format,
        modality=modality,
        num_frames=num_frames,
        short_side=short_side,
        jpeg_quality=jpeg_quality,
        shard_megabytes=shard_megabytes,
        seed=seed,
    )
    site, console = _site(), _console()
    from ray_jobs import pack as job
    from ray_jobs.plan import absolute

    run = job.repair if repair else job.pack
    packed = run(site, video_set, absolute(to) if to else site.dataset_uri(name), options, console)
    if video_set.num_unlisted:
        console.say(f"  {video_set.num_unlisted} videos are in no split file and were left out")
    console.result(
        {
            "uri": packed.uri,
            "fingerprint": packed.index.fingerprint,
            "clips": len(packed.index.clips_table),
            "rejected": [{"path": path, "reason": reason} for path, reason in packed.rejected],
        }
    )
    if len(packed.rejected) > max_rejected:
        raise UserError(
            f"{len(packed.rejected)} videos were rejected (see {packed.uri}/rejected.parquet) and --max-rejected is "
            f"{max_rejected}: mend them and pack under another name, or allow them"
        )


@app.command()
def verify(
    dataset: Annotated[str, typer.Argument(help="A packed set: name, s3:// URI or folder.")],
) -> None:
    """Read every clip of a packed set again and compare it with its digest; exit code 2 if anything is wrong.

    Examples:

    `tavlad verify hmdb51`

    `tavlad --json verify s3://tavlad/datasets/hmdb51`
    """
    site, console = _site(["s3", "ray"]), _console()
    from ray_jobs.plan import locate_set
    from ray_jobs.verify import show_problems, verify_set

    verified = verify_set(site, locate_set(site, dataset), console)
    if verified.problems:
        show_problems(verified.problems, console)
    else:
        console.say(f"  whole: {len(verified.index.clips_table)} clips of {verified.uri}")
    console.result(verified.document())
    if verified.problems:
        raise UserError(
            f"{verified.uri} has {len(verified.problems)} problems; repair it with the command that packed it and "
            f"--repair: {verified.repair} (and the --layout and --splits it was packed with)"
        )


@app.command()
def codebook(
    recipe: RecipeArgument, split: SplitOption = 1, dataset: DatasetOption = None, change: SetOption = None
) -> None:
    """Find the K visual words of a set's training part by k-means. `train` does this itself where it is missing.

    Example: `tavlad codebook ta-vlad --dataset hmdb51 --split 1`
    """
    from ray_jobs.recipe import load_recipe

    loaded = load_recipe(recipe, change, dataset)
    site, console = _site(), _console()
    from ray_jobs.codebook import make_codebook

    made = make_codebook(site, loaded, split, console)
    console.result({"uri": made.uri, "made": not made.was_there})


@app.command()
def features(
    recipe: RecipeArgument,
    split: SplitOption = 1,
    views: Annotated[
        int | None, typer.Option(min=1, max=40, help="Views of a training clip (instead of training.num_views).")
    ] = None,
    stage: Annotated[
        int,
        typer.Option(min=1, max=2, help="For stage 1, the trunk's last maps; for stage 2, those below its last block."),
    ] = 1,
    dataset: DatasetOption = None,
    change: SetOption = None,
) -> None:
    """Compute a frozen trunk's features of every view once, for all trainings and sweeps that follow.

    A training that finds them does not run the trunk in its first stage; one that does not writes what it computes.
    Those of stage 2 are used where the recipe says so (stage2.features).

    Examples:

    `tavlad features ta-vlad --dataset hmdb51 --split 1 --views 8`

    `tavlad features ta-vlad --dataset hmdb51 --split 1 --views 4 --stage 2`
    """
    from ray_jobs.recipe import load_recipe

    loaded = load_recipe(recipe, change, dataset)
    site, console = _site(), _console()
    from ray_jobs.features import fill_features

    learned = loaded.stage1 if stage == 1 else loaded.stage2
    filled = fill_features(site, loaded, split, views, console, learned)
    console.say(f"  {filled.num_entries} clip views, {filled.num_bytes / 1e9:.2f} GB, at {filled.uri}")
    console.result(dataclasses.asdict(filled))


@app.command()
def train(
    recipe: RecipeArgument,
    split: SplitOption = 1,
    dataset: DatasetOption = None,
    change: SetOption = None,
    register: Annotated[bool, typer.Option(help="Register the model at the end.")] = True,
    resume_with_new_code: ResumeOption = False,
    fresh: FreshOption = False,
) -> None:
    """Train both stages, evaluate and register; started again it goes on where it was.

    What is done is found again, and it is said if other code trained it. What other code began and did not end is
    refused, unless `--resume-with-new-code` or `--fresh` says what to do.

    Examples:

    `tavlad train ta-vlad --dataset hmdb51 --split 1`

    `tavlad train mine.toml --split 2 --set stage1.lr=0.005 --set resources.workers=2`
    """
    from ray_jobs.recipe import load_recipe

    other_code = _other_code(resume_with_new_code, fresh)
    loaded = load_recipe(recipe, change, dataset)
    site, console = _site(), _console()
    from ray_jobs.train import train as run

    done = run(site, loaded, split, console, register=register, other_code=other_code)
    console.result(done.document() if done is not None else {"registered": False})


@app.command()
def tune(
    recipe: RecipeArgument,
    split: SplitOption = 1,
    trials: Annotated[int | None, typer.Option(help="Configurations to try; a grid has its own number.")] = None,
    space: Annotated[Path | None, typer.Option(help="TOML file of fields with values or bounds.")] = None,
    search: Annotated[
        Literal["random", "grid", "optuna"], typer.Option(help="A seeded draw, every combination, or Optuna's TPE.")
    ] = "random",
    scheduler: Annotated[
        Literal["halving", "asha", "none"],
        typer.Option(
            help="Let the best quarter of the trials go on after a fifth of the epochs, or train all to their end. "
            "asha is another name of halving, which waits for all trials."
        ),
    ] = "halving",
    finalists: Annotated[
        int, typer.Option(help="Best configurations to train in both stages, evaluate and register.")
    ] = 1,
    held_out: Annotated[float, typer.Option(help="Share of the training clips to choose by, in whole groups.")] = 0.25,
    at_once: Annotated[int | None, typer.Option(help="Trials at the same time, at most.")] = None,
    workers_per_trial: Annotated[int, typer.Option(help="Workers (DDP ranks) that share a trial.")] = 1,
    dataset: DatasetOption = None,
    change: SetOption = None,
    resume_with_new_code: ResumeOption = False,
    fresh: FreshOption = False,
) -> None:
    """Find the learning rate, K and U, or any other field, for a set; then train the best configuration in full.

    Trials train stage 1 on shared features and are compared on clips held out of the training part, never on the test
    part. Started again it goes on; trials that are over are not repeated. Without `--space`: stage1.lr from 1e-4 to
    3e-2, model.num_clusters of 16, 32, 64, 128 and model.gru_width of 128, 256, 512, where the model has them.

    Examples:

    `tavlad tune ta-vlad --dataset hmdb51 --split 1 --trials 24`

    `tavlad tune mine.toml --space space.toml --search grid --scheduler none --finalists 3`
    """
    from ray_jobs.recipe import load_recipe
    from ray_jobs.space import load_space
    from ray_jobs.sweep import SweepOptions

    other_code = _other_code(resume_with_new_code, fresh)
    loaded = load_recipe(recipe, change, dataset)
    options = SweepOptions(
        search=search,
        scheduler="halving" if scheduler == "asha" else scheduler,
        trials=trials,
        share=held_out,
        finalists=finalists,
        at_once=at_once,
        workers_per_trial=workers_per_trial,
    )
    dimensions = load_space(space, loaded)
    site, console = _site(), _console()
    from ray_jobs.tune import tune_recipe

    swept = tune_recipe(site, loaded, split, dimensions, options, console, other_code)
    console.say(f"  the sweep in MLflow: {swept.run_url}")
    console.result(swept.document())


@app.command()
def register(
    recipe: RecipeArgument, split: SplitOption = 1, dataset: DatasetOption = None, change: SetOption = None
) -> None:
    """Register the model of a training that is done, as `train` does at its end. Twice is the same as once.

    Example: `tavlad register ta-vlad --dataset hmdb51 --split 1`
    """
    from ray_jobs.recipe import load_recipe

    loaded = load_recipe(recipe, change, dataset)
    site, console = _site(), _console()
    from ray_jobs.register import register_finished

    done = register_finished(site, loaded, split, console)
    console.result(done.document())


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="NAME@best, NAME/VERSION or a model's directory.")],
    dataset: Annotated[str, typer.Option(help="A packed set: name, s3:// URI or folder.")],
    split: SplitOption = 1,
    part: Annotated[Literal["train", "test"], typer.Option(help="Which part of the split.")] = "test",
    also: Annotated[
        list[str] | None,
        typer.Option("--fuse", metavar="MODEL=SET", help="Another model and its set of the same videos; repeatable."),
    ] = None,
) -> None:
    """Score a model on a part of a split: top-1, top-5, mean class accuracy, and each action's.

    With `--fuse` several models answer together: their probabilities are averaged, with equal weights.

    Examples:

    `tavlad evaluate tavlad-hmdb51-split1@best --dataset hmdb51 --split 1`

    `tavlad evaluate tavlad-hmdb51-split1@best --dataset hmdb51 --fuse tavlad-hmdb51-flow-split1@best=hmdb51-flow`
    """
    pairs = [(model, dataset)]
    for pair in also or []:
        other, equals, other_set = pair.rpartition("=")
        if not (equals and other and other_set):
            raise UserError(f"--fuse {pair}: write it as MODEL=SET, such as tavlad-mine-flow-split1@best=mine-flow")
        pairs.append((other, other_set))
    site, console = _site(), _console()
    from ray_jobs.evaluate import evaluate_model, fuse_evaluations

    evaluations = [evaluate_model(site, each, its_set, split, part, console) for each, its_set in pairs]
    for (each, its_set), alone in zip(pairs, evaluations, strict=True):
        if len(pairs) > 1:
            console.say(f"  {each} on {its_set} alone: {part}/top1 {alone.scores.top(1):.1%}")
    evaluation = fuse_evaluations(evaluations)
    scores = evaluation.scores
    rows = [
        [action, str(row.sum()), f"{row[label] / max(1, row.sum()):.1%}"]
        for label, (action, row) in enumerate(zip(evaluation.actions, scores.confusion, strict=True))
    ]
    console.table(["action", "clips", "right"], rows)
    summary = scores.summary(part)
    console.say(", ".join(f"{name} {value:.1%}" for name, value in summary.items()))
    console.result(summary | {"clips": len(scores.keys), "confusion": scores.confusion.tolist()})


@app.command()
def attention(
    model: Annotated[str, typer.Argument(help="NAME@best, NAME/VERSION or a model's directory.")],
    clips: Annotated[list[Path], typer.Option(help="A video file; may be given several times.")],
    to: Annotated[Path, typer.Option(help="Folder for attention.png and an MP4 a video.")] = Path("attention"),
) -> None:
    """Show where a model looks, beside where the untouched ImageNet trunk does (Figure 3); viridis, from 0 to 1.

    Example: `tavlad attention tavlad-hmdb51-split1@best --clips golf.avi --clips hug.avi --to figure3/`
    """
    from functools import partial

    from ray_jobs.attention import draw_attention
    from ray_jobs.plan import read_uri

    console = _console()
    is_directory = Path(model).is_dir()  # which needs no services
    site = None if is_directory else _site(["s3", "mlflow"])
    read_bytes = partial(read_uri, site) if site is not None else None
    drawn = draw_attention("" if site is None else site.mlflow_uri, model, clips, to, console, read_bytes)
    console.table(
        ["attention of", "mean", "places above 0.5"],
        [
            ["ImageNet trunk", f"{drawn.mean_before:.2f}", f"{drawn.above_half_before:.1%}"],
            ["trained model", f"{drawn.mean_after:.2f}", f"{drawn.above_half_after:.1%}"],
        ],
    )
    console.say(f"{drawn.grid} and {len(drawn.overlays)} MP4 beside it")
    console.result(
        {
            "grid": str(drawn.grid),
            "overlays": [str(path) for path in drawn.overlays],
            "mean": {"imagenet": drawn.mean_before, "trained": drawn.mean_after},
            "above_half": {"imagenet": drawn.above_half_before, "trained": drawn.above_half_after},
        }
    )


@app.command()
def reproduce(
    datasets: Annotated[list[str], typer.Argument(help="Packed sets: hmdb51, ucf101, or any other.")],
    table: Annotated[int, typer.Option(min=1, max=2, help="Table 1 (split 1) or Table 2 (three splits).")] = 1,
    rows: Annotated[list[str] | None, typer.Option(help="Recipe of a row; may be given several times.")] = None,
    subset: Annotated[float, typer.Option(help="Share of the clips to rehearse with.")] = 1.0,
    epochs_scale: Annotated[float, typer.Option(help="What epochs are multiplied by to rehearse.")] = 1.0,
    change: SetOption = None,
    to: Annotated[Path | None, typer.Option(help="Folder for report.html and report.json.")] = None,
    resume_with_new_code: ResumeOption = False,
    fresh: FreshOption = False,
) -> None:
    """Run what is missing of a table of the paper; write our numbers beside the published ones. Twice is once.

    Examples:

    `tavlad reproduce hmdb51 --table 1 --set resources.gpus_per_worker=1`

    `tavlad reproduce hmdb51 ucf101 --table 2`

    `tavlad reproduce mine --subset 0.1 --epochs-scale 0.1`  (a rehearsal, and the report says so)

    `tavlad reproduce mine --table 2 --set ta-vlad:training.batch_size=16`  (changes one row)
    """
    other_code = _other_code(resume_with_new_code, fresh)
    site, console = _site(), _console()
    from ray_jobs.reproduce import ReproduceOptions
    from ray_jobs.reproduce import reproduce as run

    options = ReproduceOptions(
        table=1 if table == 1 else 2,
        rows=tuple(rows or ()),
        subset=subset,
        epochs_scale=epochs_scale,
        other_code=other_code,
        changes=tuple(change or ()),
    )
    folder = to or Path(f"reproduce-{'-'.join(Path(name).name for name in datasets)}-table{table}")
    console.result(run(site, datasets, options, folder, console))


@app.command()
def demo(
    videos: Annotated[
        Path | None, typer.Option(help="A folder per action of videos (instead of rendered ones).")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the set made of --videos (instead of the folder's).")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Training workers (DDP ranks).")] = 1,
) -> None:
    """Everything once: videos, packing, training of two models, registration, prediction, a report.

    Examples:

    `tavlad demo`

    `tavlad demo --videos my_videos/`
    """
    site, console = _site(), _console()
    from ray_jobs.demo import run_demo

    console.result(run_demo(site, videos, name, workers, console))


def _other_code(resume: bool, fresh: bool) -> Literal["refuse", "go on", "begin anew"]:
    if resume and fresh:
        raise UserError("--resume-with-new-code goes on, and --fresh begins anew: give one of the two")
    return "go on" if resume else "begin anew" if fresh else "refuse"


app.add_typer(cli_models.app)
app.add_typer(cli_jobs.app)
app.add_typer(cli_jobs.site_app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command, and end it as `cli_ending` says if a verb fails."""
    Settings.words = tuple(sys.argv[1:] if arguments is None else arguments)
    try:
        with interruptible():
            app(arguments)
    except Exception as error:  # noqa: BLE001  whatever it is, it is told
        sys.exit(tell(error, Settings.words))


if __name__ == "__main__":
    main()
