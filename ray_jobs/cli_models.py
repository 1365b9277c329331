"""The verbs of a registered model: list, choose, fetch, use."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ray_jobs.cli_settings import BAD_VIDEO, console, site

app = typer.Typer()
ModelArgument = Annotated[str, typer.Argument(help="NAME@best, NAME/VERSION or a model's directory.")]


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="NAME@best, NAME/VERSION or a model's directory.")],
    videos: Annotated[list[Path], typer.Argument(help="Video files.")],
    top: Annotated[int, typer.Option(min=1, help="Actions to name for each video.")] = 5,
) -> None:
    """Name the actions in videos with a registered model. A bad video is reported, the others are done (exit code 3).

    Example: `tavlad predict tavlad-demo-split1@best clip.mp4 --top 3`
    """
    from ray_jobs.predict import predict_videos

    out = console()
    # A directory needs no services.
    tracking_uri = "" if Path(model).is_dir() else site(["s3", "mlflow"]).mlflow_uri
    predictions, failures = predict_videos(tracking_uri, model, videos, top)
    rows = [[each.video, str(each.rank), each.action, f"{each.probability:.1%}"] for each in predictions]
    out.table(["video", "rank", "action", "probability"], rows)
    for video, reason in failures:
        out.say(f"not predicted: {video}: {reason}")
    document: dict[str, Any] = {
        "predictions": [
            {"video": each.video, "rank": each.rank, "action": each.action, "probability": each.probability}
            for each in predictions
        ],
        "failures": [{"video": video, "reason": reason} for video, reason in failures],
    }
    out.result(document)
    if failures:
        raise typer.Exit(BAD_VIDEO)
