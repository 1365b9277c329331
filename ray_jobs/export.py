"""tavlad export: a model as one file that runs elsewhere, compared with the model on videos."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ray_jobs.clips import clip_of
from ray_jobs.models import fetch_model
from ray_jobs.predict import find_videos
from shards.scratch import scratch
from tavlad.checkpoint import load_card
from tavlad.export import Exported, Format, export


def export_model(tracking_uri: str, model: str, kind: Format, path: Path, videos: Sequence[str]) -> Exported:
    """Write the model to `path`; `videos` (files, folders, patterns) are what it is compared on, noise without any."""
    with scratch() as folder:
        directory = fetch_model(tracking_uri, model, folder / "model")
        card = load_card(directory)
        clips_BTCHW = torch.stack([clip_of(each, card) for each in find_videos(videos)]) if videos else None
        return export(directory, kind, path, clips_BTCHW)
