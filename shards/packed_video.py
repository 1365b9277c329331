"""A video as it lies in a shard of format video: `KEY.json`, then the file itself, decoded when it is read."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath

import torch
from jaxtyping import UInt8
from torch import Tensor

from tavlad.clip import BadClip

_VIDEO = "video"  # in the facts: what reading needs; its presence tells the format


def video_files(name: str, facts: Mapping[str, object], short_side: int, content: bytes) -> dict[str, bytes]:
    """The files of a clip that is a whole video: `json`, then the video under its own suffix, in small letters."""
    suffix = suffix_of(name)
    described = {**facts, _VIDEO: {"suffix": suffix, "short_side": short_side}}
    member = suffix.removeprefix(".")
    # WebDataset and tar take any name; a name that reads as the facts, or as nothing, would not be found again.
    member = member if member.isalnum() and member.isascii() and member != "json" else "video"
    return {"json": json.dumps(described, separators=(",", ":")).encode(), member: content}


def suffix_of(name: str) -> str:
    """Such as ".avi"; empty for none."""
    return PurePosixPath(name).suffix.lower()


def decode_packed_video(facts: Mapping[str, object], content: memoryview) -> UInt8[Tensor, "T 3 H W"] | None:
    """The clip's frames, as packing them would have chosen and shrunk them; None if `facts` are those of JPEGs.

    In memory the channels come last. Raises `BadClip` with the clip's key if this machine's decoder refuses what the
    packing one's took.
    """
    video, indices = facts.get(_VIDEO), facts["frame_indices"]
    if video is None:
        return None
    assert isinstance(video, dict)
    assert isinstance(indices, list)
    # Here, so that sets of frames are read where PyAV is not installed, as on a bare GPU host.
    from shards.video import VideoError, decode_frames_at

    try:
        frames_THWC = decode_frames_at(bytes(content), indices, int(video["short_side"]), str(video["suffix"]))
    except VideoError as error:
        raise BadClip(
            f"clip {facts['key']} {error.reason}, though it could be decoded where it was packed: use the same version "
            "of PyAV everywhere, or pack the set again"
        ) from error
    return torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
