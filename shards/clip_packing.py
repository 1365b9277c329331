"""One video becomes one clip of a shard, or a reason why it cannot."""

import hashlib
import socket

import torch

from shards.clip_bytes import encode_jpeg, frame_files, tar_members
from shards.motion import decode_motion
from shards.packed_video import suffix_of, video_files
from shards.plan import PackOptions, PackPlan, PlannedClip, size_and_digest
from shards.video import DecodedClip, VideoError, decode_clip
from tavlad.errors import UserError

_MAX_VIDEO_BYTES = 1 << 30  # of a file packed as it is: a reader holds it in memory whole

Row = dict[str, object]


def pack_clip(plan: PackPlan, clip: PlannedClip) -> tuple[bytes, Row] | VideoError:
    """The clip's bytes in the shard and its row but for where that is, or why it cannot be packed."""
    try:
        if plan.options.format == "video":
            return _pack_video(plan, clip)
        return _pack_frames(plan, clip)
    except VideoError as error:
        return error


def reason_to_reject(plan: PackPlan, clip: PlannedClip) -> tuple[str, str] | None:
    """Path and reason if the video cannot be packed."""
    outcome = pack_clip(plan, clip)
    return (printable(clip.video.name), outcome.reason) if isinstance(outcome, VideoError) else None


def _pack_frames(plan: PackPlan, clip: PlannedClip) -> tuple[bytes, Row]:
    options = plan.options
    _check_source(clip, size_and_digest(clip.video.path)[1])
    decoded = _decode(clip, options)
    row, facts = _described(clip, decoded)
    frames_TCHW = torch.from_numpy(decoded.frames_THWC).permute(0, 3, 1, 2)
    jpegs = [encode_jpeg(frame_CHW, options.jpeg_quality) for frame_CHW in frames_TCHW]
    return tar_members(clip.key, frame_files(facts, jpegs)), row


def _decode(clip: PlannedClip, options: PackOptions) -> DecodedClip:
    if options.modality == "rgb":
        return decode_clip(clip.video.path, options.num_frames, options.short_side)
    return decode_motion(clip.video.path, options.num_frames, options.short_side, options.modality)


def _pack_video(plan: PackPlan, clip: PlannedClip) -> tuple[bytes, Row]:
    options, path = plan.options, clip.video.path
    if clip.num_bytes > _MAX_VIDEO_BYTES:
        size = f"{clip.num_bytes / _MAX_VIDEO_BYTES:.1f} GiB"
        raise VideoError(str(path), f"has {size}, too much for one clip: cut it, or pack with --format frames")
    try:
        content = path.read_bytes()
    except OSError:
        content = None
    _check_source(clip, "" if content is None else hashlib.sha256(content).hexdigest())
    # Decoded here to its end, so that a bad video is rejected now; from its bytes, as it will be when it is read.
    source = path if content is None else content
    decoded = decode_clip(source, options.num_frames, options.short_side, suffix_of(clip.video.name))
    assert content is not None, "decode_clip refuses what cannot be read"
    row, facts = _described(clip, decoded)
    return tar_members(clip.key, video_files(clip.video.name, facts, options.short_side, content)), row


def _described(clip: PlannedClip, decoded: DecodedClip) -> tuple[Row, Row]:
    """The clip's row in the index but for its place, and its `KEY.json`."""
    video = clip.video
    described: Row = {
        "key": clip.key,
        "action": video.action,
        "label": clip.label,
        "group": printable(video.group),
        "source": printable(video.name),
        "num_source_frames": decoded.num_source_frames,
        "source_fps": decoded.source_fps,
        "width": decoded.width,
        "height": decoded.height,
    }
    height, width = decoded.frames_THWC.shape[1:3]
    facts = described | {
        "splits": video.splits,
        "frame_indices": decoded.frame_indices,
        "frame_size": [width, height],
        "source_sha256": clip.digest,
    }
    return described | {f"split{k}": part for k, part in enumerate(video.splits, start=1)}, facts


def _check_source(clip: PlannedClip, digest: str) -> None:
    """A source must be what the plan says, or the set would not be what its fingerprint says."""
    if digest == clip.digest:
        return
    if not digest:
        raise UserError(
            f"{clip.video.path} cannot be read on {socket.gethostname()}, and could be where packing began: make the "
            "videos' folder readable at the same path on every node, then run the same command again"
        )
    raise UserError(f"{clip.video.path} has changed since packing began: run the same command again")


def printable(path: str) -> str:
    """File names may hold bytes that are no text; tables may not. The key keeps them all."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
