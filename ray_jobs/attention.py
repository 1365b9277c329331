"""tavlad attention: where a model looks (Figure 3), beside where its untouched trunk does. Needs no cluster."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from ray_jobs.clips import clip_of
from ray_jobs.console import Console
from ray_jobs.models import fetch_model
from shards.render import encode_video
from shards.scratch import scratch
from tavlad import figures
from tavlad.backbone import load_weights
from tavlad.checkpoint import ModelCard, load_model
from tavlad.errors import UserError
from tavlad.model import TaVlad

_FRAMES_PER_SECOND = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPictures:
    """What was written, and how strongly each model looks on average, from 0 to 1."""

    grid: Path
    overlays: list[Path]
    mean_before: float
    mean_after: float
    above_half_before: float
    """Share of places with an attention above 0.5."""
    above_half_after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Clip:
    name: str
    frames_THWC: UInt8[np.ndarray, "T H W 3"]
    before_Thw: Float[np.ndarray, "T h w"]
    after_Thw: Float[np.ndarray, "T h w"]


def draw_attention(
    tracking_uri: str,
    model: str,
    videos: list[Path],
    folder: Path,
    console: Console,
    read_bytes: Callable[[str], bytes] | None = None,
) -> AttentionPictures:
    """`attention.png`, a column a video with its middle frame, and an MP4 a video with all its frames, in `folder`.

    `read_bytes` fetches trunk weights from s3://. Raises ValueError for a video that cannot be decoded, for a model
    whose trunk has no class activation maps, and for ImageNet weights that cannot be had.
    """
    with scratch() as fetched:
        trained, card = load_model(fetch_model(tracking_uri, model, fetched / "model"))
    if not trained.trunk.has_activation_maps:
        raise UserError(f"{model} has trunk {card.model.trunk}, which has no class activation maps: nothing to draw")
    untouched = _untouched(card, read_bytes)
    clips: list[_Clip] = []
    with console.progress("clips drawn", len(videos)) as advance:
        for place, video in enumerate(videos):
            clips.append(_look(video, card, untouched, trained))
            advance(place + 1, video.name)
    return _write(folder, clips)


def _untouched(card: ModelCard, read_bytes: Callable[[str], bytes] | None) -> TaVlad:
    """The model as it was before any training: only its trunk matters here."""
    model = TaVlad(card.model, len(card.actions))
    load_weights(model.trunk, card.model.trunk, card.model.weights, read_bytes)
    if model.attention_trunk is not None:
        model.attention_trunk.load_state_dict(model.trunk.state_dict())
    return model.eval()


def _look(video: Path, card: ModelCard, untouched: TaVlad, trained: TaVlad) -> _Clip:
    frames_TCHW = clip_of(video, card)
    return _Clip(
        name=video.stem,
        frames_THWC=frames_TCHW.permute(0, 2, 3, 1).numpy(),
        before_Thw=untouched.attention(frames_TCHW[None])[0].numpy(),
        after_Thw=trained.eval().attention(frames_TCHW[None])[0].numpy(),
    )


def _write(folder: Path, clips: list[_Clip]) -> AttentionPictures:
    folder.mkdir(parents=True, exist_ok=True)
    middles = [len(clip.frames_THWC) // 2 for clip in clips]
    figure = figures.attention_grid(
        np.stack([clip.frames_THWC[middle] for clip, middle in zip(clips, middles, strict=True)]),
        np.stack([clip.before_Thw[middle] for clip, middle in zip(clips, middles, strict=True)]),
        np.stack([clip.after_Thw[middle] for clip, middle in zip(clips, middles, strict=True)]),
        titles=[clip.name for clip in clips],
    )
    grid = folder / "attention.png"
    grid.write_bytes(figures.png(figure))
    overlays: list[Path] = []
    for place, clip in enumerate(clips):
        path = folder / f"{place:02d}_{clip.name}.mp4"  # two videos may have one name
        shown_THWC = figures.attention_overlay(clip.frames_THWC, [clip.before_Thw, clip.after_Thw])
        path.write_bytes(encode_video(shown_THWC, _FRAMES_PER_SECOND))
        overlays.append(path)
    before, after = (np.concatenate([maps.ravel() for maps in side]) for side in _sides(clips))
    return AttentionPictures(
        grid=grid,
        overlays=overlays,
        mean_before=float(before.mean()),
        mean_after=float(after.mean()),
        above_half_before=float((before > 0.5).mean()),
        above_half_after=float((after > 0.5).mean()),
    )


def _sides(clips: list[_Clip]) -> tuple[list[Float[np.ndarray, "T h w"]], list[Float[np.ndarray, "T h w"]]]:
    return [clip.before_Thw for clip in clips], [clip.after_Thw for clip in clips]
