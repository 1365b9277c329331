"""The verbs of a registered model: list, choose, fetch, use."""

import datetime
import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from infra.site import Site
from ray_jobs.cli_settings import BAD_VIDEO, console, site
from tavlad.errors import UserError

app = typer.Typer()

ModelArgument = Annotated[str, typer.Argument(help="NAME@best, NAME/VERSION or a model's directory.")]
_TABLE_ROWS = 200
"""Rows of predictions that a person reads; more go to a file."""


@app.command()
def deliver() -> None:
    """Tell MLflow what trainings on this machine could not tell it while it was away. Twice is the same as once.

    Example: `tavlad deliver`
    """
    chosen = _mlflow()
    from ray_jobs.run_records import deliver_waiting

    left = deliver_waiting(chosen)
    waiting = {name: count for name, count in left.items() if count}
    out = console()
    for name, count in waiting.items():
        out.say(f"{count} records of {name} wait still")
    out.say(f"MLflow knows all of {len(left) - len(waiting)} runs of this machine")
    out.result({"runs": len(left), "waiting": waiting})


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One registered model (instead of all).")] = None,
) -> None:
    """List the registered models: every version, its accuracy, where it comes from, and which is the best.

    Example: `tavlad models`
    """
    tracking_uri = _mlflow().mlflow_uri
    from tavlad.registry_queries import registered_models

    rows = registered_models(tracking_uri, name)
    out = console()
    out.table(
        ["model", "version", "best", "variant", "top-1", "top-5", "mean class", "registered", "git"],
        [
            [
                row.name,
                str(row.version),
                "best" if row.is_best else "",
                row.tags.get("variant", ""),
                *(_percent(row.tags.get(tag)) for tag in ("test_top1", "test_top5", "test_mean_class")),
                datetime.datetime.fromtimestamp(row.created / 1000).astimezone().strftime("%Y-%m-%d %H:%M"),
                row.tags.get("git", "")[:10] + ("-dirty" if row.tags.get("git_dirty") == "true" else ""),
            ]
            for row in rows
        ],
    )
    for row in rows:
        if row.is_best and "best.reason" in row.tags:
            out.say(f"{row.name} version {row.version} was chosen by hand: {row.tags['best.reason']}")
    if not rows:
        out.say("no model is registered yet: `tavlad train` registers one")
    fields = ("name", "version", "run_id", "is_best", "created")
    out.result({"models": [{key: getattr(row, key) for key in fields} | {"tags": dict(row.tags)} for row in rows]})


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="NAME/VERSION; with --rollback, NAME.")],
    reason: Annotated[str, typer.Option(help="Why; it is kept as the version's tag best.reason.")],
    rollback: Annotated[bool, typer.Option("--rollback", help="Go back to the version that was the best before.")] = (
        False
    ),
) -> None:
    """Make a version the best by hand, or take the last change of the best back.

    Examples:

    `tavlad promote tavlad-hmdb51-split1/7 --reason "8 was trained on a wrong crop"`

    `tavlad promote --rollback tavlad-hmdb51-split1 --reason "8 fails on night videos"`
    """
    tracking_uri = _mlflow().mlflow_uri
    from tavlad.promotion import promote as make_best
    from tavlad.promotion import roll_back

    moved = (roll_back if rollback else make_best)(tracking_uri, model, reason)
    before = f" (it was version {moved.previous})" if moved.previous is not None else ""
    out = console()
    out.say(f"{moved.name}@best is version {moved.version} now{before}")
    out.result({"name": moved.name, "version": moved.version, "previous": moved.previous, "reason": moved.reason})


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="NAME@best or NAME/VERSION.")],
    directory: Annotated[Path, typer.Argument(help="A folder, new or empty.")],
) -> None:
    """Fetch a registered model, checked by its digest; a pull that was cut goes on where it was.

    Example: `tavlad pull tavlad-hmdb51-split1@best model/`, then `tavlad predict model/ clip.mp4`
    """
    tracking_uri = _mlflow().mlflow_uri
    from tavlad.pull import pull as fetch

    out = console()
    with out.progress("percent", 100) as advance:
        pulled = fetch(
            tracking_uri,
            model,
            directory,
            lambda done, total: advance(100 * done // total, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"),
        )
    out.say(f"{pulled.name} version {pulled.version} is in {pulled.directory} (sha256 {pulled.digest})")
    out.result(
        {"name": pulled.name, "version": pulled.version, "directory": str(pulled.directory), "sha256": pulled.digest}
    )


@app.command()
def predict(
    model: ModelArgument,
    videos: Annotated[
        list[str], typer.Argument(help="Video files, folders of them, or patterns such as 'a/**/*.mp4'.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Actions to name for each video.")] = 5,
    window: Annotated[str | None, typer.Option(help="Cut videos into windows this long, such as 4s.")] = None,
    stride: Annotated[str | None, typer.Option(help="From one window to the next, such as 2s (else half one).")] = None,
    attention: Annotated[
        Path | None, typer.Option(help="An .mp4 of where the model looks; a folder for several videos.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File for one JSON object a row, instead of the table.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Parquet file for the rows, instead of the table.")] = None,
) -> None:
    """Name the actions in videos with a registered model. A bad video is reported, the others are done (exit code 3).

    Examples:

    `tavlad predict tavlad-demo-split1@best clip.mp4 --top 3`

    `tavlad predict tavlad-demo-split1@best match.mp4 --window 4s --stride 2s --parquet timeline.parquet`
    """
    from ray_jobs.clips import Windows
    from ray_jobs.predict import PredictOptions, find_videos, predict_videos, seconds_of

    out = console()
    windows = None
    if window is not None:
        seconds = seconds_of(window)
        windows = Windows(seconds=seconds, stride=seconds / 2 if stride is None else seconds_of(stride))
    elif stride is not None:
        raise UserError("--stride says how far apart windows begin: give --window too")
    if attention is not None and windows is not None:
        raise UserError("--attention shows whole videos: leave --window out")
    options = PredictOptions(top=top, windows=windows, attention=attention, json_lines=json, parquet=parquet)
    found = find_videos(videos)
    # A directory needs no services.
    tracking_uri = "" if Path(model).is_dir() else _mlflow().mlflow_uri
    done = predict_videos(tracking_uri, model, found, options, out)
    _show(done.rows[:_TABLE_ROWS], windows is not None)
    if len(done.rows) > _TABLE_ROWS:
        out.say(f"{len(done.rows) - _TABLE_ROWS} more rows: give --json FILE or --parquet FILE to keep them")
    for path in filter(None, (json, parquet)):
        out.say(f"{done.num_rows} rows in {path}")
    document: dict[str, Any] = {"videos": done.num_videos, "rows": done.num_rows}
    document["failures"] = [{"video": video, "reason": reason} for video, reason in done.failures]
    if json is None and parquet is None:
        document["predictions"] = done.rows
    out.result(document)
    if done.failures:
        out.say(f"{len(done.failures)} of {done.num_videos} videos could not be used")
        raise typer.Exit(BAD_VIDEO)


@app.command()
def export(
    model: ModelArgument,
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    to: Annotated[Literal["pt2", "onnx"], typer.Option(help="torch.export program, or ONNX.")],
    check: Annotated[
        list[str] | None, typer.Option(help="Videos to compare the two on (instead of noise); files or folders.")
    ] = None,
) -> None:
    """Write a model as one file that runs without tavlad, for any number of clips, and compare it with the original.

    Example: `tavlad export tavlad-hmdb51-split1@best model.onnx --to onnx --check clips/`
    """
    # A directory needs no services.
    tracking_uri = "" if Path(model).is_dir() else _mlflow().mlflow_uri
    from ray_jobs.export import export_model

    out = console()
    exported = export_model(tracking_uri, model, to, file, check or [])
    compared = f"{exported.num_clips} clips{'' if check else ' of noise'}"
    out.say(f"{exported.path}: on {compared} no probability differs by more than {exported.difference:.1e}")
    out.result({"path": str(exported.path), "clips": exported.num_clips, "difference": exported.difference})


@app.command()
def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to answer at; another than loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to answer at.")] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model on the cluster.")] = 1,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest video taken.")] = 64,
    seconds: Annotated[float, typer.Option(help="Time for one answer.")] = 60.0,
    token_file: Annotated[Path | None, typer.Option(help="File with the token that requests must bear.")] = None,
) -> None:
    """Answer predictions over HTTP until interrupted, by Ray Serve.

    Examples:

    `tavlad serve tavlad-hmdb51-split1@best`, then `curl -F video=@clip.mp4 http://127.0.0.1:8000/predict`

    `tavlad serve tavlad-hmdb51-split1@best --host 0.0.0.0 --token-file token.txt --replicas 4`
    """
    if token_file is not None and not token_file.is_file():
        raise UserError(f"{token_file} does not exist: write the token into it")
    try:
        token = None if token_file is None else token_file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{token_file} is no text: write the token into it") from error
    chosen = site()
    _require_serve()
    from ray_jobs.serve import ServeOptions, serve_model

    options = ServeOptions(
        host=host, port=port, replicas=replicas, max_megabytes=max_megabytes, seconds=seconds, token=token
    )
    serve_model(chosen, model, options, console())


def _mlflow() -> Site:
    """The site of a verb that asks only MLflow, which on the embedded site keeps its artifacts on S3."""
    return site(["s3", "mlflow"], keys=False)


def _require_serve() -> None:
    """ValueError that names the extra when Ray Serve's own requirements are not installed."""
    missing = [name for name in ("fastapi", "python_multipart", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs {', '.join(missing)}: install the extra `serve`, pip install 'tavlad[serve]'")


def _show(rows: list[dict[str, Any]], timeline: bool) -> None:
    """A person's table of predictions."""
    if not rows:
        return
    times = ["start", "end"] if timeline else []
    console().table(
        ["video", *times, "rank", "action", "probability"],
        [
            [
                row["video"],
                *(f"{row[name]:.1f} s" for name in times),
                str(row["rank"]),
                row["action"],
                f"{row['probability']:.1%}",
            ]
            for row in rows
        ],
    )


def _percent(share: str | None) -> str:
    try:
        return f"{float(share or ''):.1%}"
    except ValueError:
        return ""
