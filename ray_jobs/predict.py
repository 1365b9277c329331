"""tavlad predict: the actions in video files, by a registered model or one in a directory. Needs no cluster."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ray_jobs.models import fetch_model
from ray_jobs.served_model import ServedModel
from tavlad.predict import Prediction


def predict_videos(
    tracking_uri: str, model: str, videos: Sequence[Path], top: int
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """The `top` actions of each video, and (video, reason) of those that cannot be decoded."""
    with tempfile.TemporaryDirectory(prefix="tavlad-") as folder:
        served = ServedModel(fetch_model(tracking_uri, model, Path(folder) / "model"))
    return served.predict_each(videos, top)
