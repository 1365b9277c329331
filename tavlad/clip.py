"""What crosses the border between the data and the model: a clip's frame choice and a batch of clips."""

from dataclasses import dataclass

from jaxtyping import Int64, UInt8
from torch import Tensor


class BadClip(ValueError):
    """A clip that cannot be used; the text names it, the reason and the remedy."""


def uniform_frame_indices(num_frames: int, num_samples: int) -> list[int]:
    """The frames of a clip, uniform over time: floor(linspace(0, num_frames, num_samples, endpoint=False)).

    Indices are 0-based and ascending; a video shorter than `num_samples` gives some frames more than once.
    Source: METHOD, "frames"; section 3.1 of the paper (25 frames, uniformly sampled across time).

    >>> uniform_frame_indices(10, 4)
    [0, 2, 5, 7]
    >>> uniform_frame_indices(2, 4)
    [0, 0, 1, 1]
    """
    if num_frames < 1 or num_samples < 1:
        raise ValueError(f"cannot choose {num_samples} frames from {num_frames}: both must be at least 1")
    # Integer arithmetic: floating-point linspace can fall just below a whole number.
    return [sample * num_frames // num_samples for sample in range(num_samples)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipBatch:
    """One rank's share of a global batch. It may hold no clip, when the last batch is shorter than the world."""

    frames_BTCHW: UInt8[Tensor, "B T 3 H W"]
    """RGB frames, 0-255."""
    labels_B: Int64[Tensor, " B"]
    """Index of each clip's action in the set's label order."""
    keys: tuple[str, ...]
    """Key of each clip in the shard set."""
    num_clips_in_global_batch: int
    """Clips over all ranks: what the loss of this step is averaged over."""

    def __post_init__(self) -> None:
        num_clips = len(self.keys)
        assert self.frames_BTCHW.shape[0] == self.labels_B.shape[0] == num_clips, "one label and one key a clip"
        assert 1 <= self.num_clips_in_global_batch >= num_clips, "a rank's clips are part of the global batch"
