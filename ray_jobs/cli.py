"""The `tavlad` command: one verb a function; every mistake of the user is one sentence and exit code 2."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ray_jobs import cli_models
from ray_jobs.cli_settings import Settings
from ray_jobs.cli_settings import console as _console
from ray_jobs.cli_settings import site as _site

_USER_ERROR = 2

app = typer.Typer(
    name="tavlad",
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
RecipeArgument = Annotated[str, typer.Argument(help="A TOML file, or the name of a recipe that comes with tavlad.")]


@app.callback()
def settings(
    site: Annotated[str, typer.Option(help="Where to run: local, a site's name or its TOML file.")] = "local",
    json: Annotated[bool, typer.Option("--json", help="Make the last line of stdout one JSON document.")] = False,
) -> None:
    """Options of every verb."""
    Settings.site_name = site
    Settings.json_output = json


@app.command()
def up() -> None:
    """Start the local services (S3, MLflow, Ray), or say that they run.

    Example: `tavlad up`
    """
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
    from infra.local import down as stop

    stop()
    _console().result({"running": False})


@app.command()
def status() -> None:
    """Show which local services run, and where.

    Example: `tavlad --json status`
    """
    from infra.local import status as look

    console, services = _console(), look()
    rows = [
        [each.name, "running" if each.running else "stopped", each.address or "", each.detail or ""]
        for each in services
    ]
    console.table(["service", "state", "address", "detail"], rows)
    console.result({each.name: {"running": each.running, "address": each.address} for each in services})


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
    num_frames: Annotated[int, typer.Option(help="Frames of a clip, uniform over time.")] = 25,
    short_side: Annotated[int, typer.Option(help="Pixels of a frame's short side, at most.")] = 256,
    jpeg_quality: Annotated[int, typer.Option(help="Of the packed frames, 1 to 100.")] = 90,
    shard_megabytes: Annotated[int, typer.Option(help="Size of a shard, about.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the dealing to shards, and of the splits of a folder.")] = 0,
    max_rejected: Annotated[int, typer.Option(help="Videos that may fail to pack before the exit code says so.")] = 0,
) -> None:
    """Pack labelled videos into a WebDataset shard set.

    Examples:

    `tavlad pack videos/ --name mine`  (a folder per action)

    `tavlad pack hmdb51_org/ --name hmdb51 --layout hmdb51 --splits testTrainMulti_7030_splits/`
    """
    from shards.datasets import scan
    from shards.pack import PackOptions

    video_set = scan(name, videos, layout, splits, seed=seed)
    options = PackOptions(
        num_frames=num_frames,
        short_side=short_side,
        jpeg_quality=jpeg_quality,
        shard_megabytes=shard_megabytes,
        seed=seed,
    )
    site, console = _site(), _console()
    from ray_jobs.pack import pack as run

    packed = run(site, video_set, to or site.dataset_uri(name), options, console)
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
        raise ValueError(
            f"{len(packed.rejected)} videos were rejected (see {packed.uri}/rejected.parquet) and --max-rejected is "
            f"{max_rejected}: mend them and pack under another name, or allow them"
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
def train(
    recipe: RecipeArgument,
    split: SplitOption = 1,
    dataset: DatasetOption = None,
    change: SetOption = None,
    register: Annotated[bool, typer.Option(help="Register the model at the end.")] = True,
) -> None:
    """Train both stages, evaluate and register; started again it goes on where it was.

    Examples:

    `tavlad train ta-vlad --dataset hmdb51 --split 1`

    `tavlad train mine.toml --split 2 --set stage1.lr=0.005 --set resources.workers=2`
    """
    from ray_jobs.recipe import load_recipe

    loaded = load_recipe(recipe, change, dataset)
    site, console = _site(), _console()
    from ray_jobs.train import train as run

    done = run(site, loaded, split, console, register=register)
    console.result(done.document() if done is not None else {"registered": False})


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
) -> None:
    """Score a model on a part of a split: top-1, top-5, mean class accuracy, and each action's.

    Example: `tavlad evaluate tavlad-hmdb51-split1@best --dataset hmdb51 --split 1`
    """
    site, console = _site(), _console()
    from ray_jobs.evaluate import evaluate_model

    evaluation = evaluate_model(site, model, dataset, split, part, console)
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


app.add_typer(cli_models.app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; errors that users can mend end as one sentence."""
    try:
        app(arguments)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(_USER_ERROR)
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to go on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
