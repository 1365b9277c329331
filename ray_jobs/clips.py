"""Video files as clips that a model sees: decoded in threads ahead of the model, in order, with bounded memory.

A video is treated exactly as it would be by packing and training's evaluation and nothing else: the same frames, the
same reduction to the packed size, through a JPEG of the packed quality and back, the same centre crop. So a model
predicts for a file what it was measured to predict. The JPEG costs a thirtieth of the forward pass.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from shards.clip_bytes import decode_jpeg, encode_jpeg
from shards.motion import decode_motion, motion_of_frames
from shards.transforms import crop_clip
from shards.video import VideoError, decode_clip, decode_windows, never
from tavlad.checkpoint import ModelCard
from tavlad.clip import uniform_frame_indices
from tavlad.errors import UserError

_PACKED_QUALITY = 90  # where the model's card does not say
_CLIPS_AHEAD = 4
"""Of one video, decoded before the model asks for them."""
_SECONDS_BETWEEN_LOOKS = 0.2

Source = str | Path | bytes | UInt8[np.ndarray, "T 3 H W"]
"""A video: its path, its bytes, or its frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """How a long video is cut into clips."""

    seconds: float | int
    """Length of a window."""
    stride: float | int
    """Seconds from one window's start to the next's."""

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.stride > 0):
            raise ValueError(f"a window of {self.seconds} s every {self.stride} s: both must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenClip:
    """A clip as the model sees it."""

    video: str
    start: float | None
    """Seconds into the video where its window begins; None for a whole video."""
    end: float | None
    frames_TCHW: UInt8[Tensor, "T 3 crop crop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnusableVideo:
    """A video that cannot be used, or not to its end."""

    video: str
    reason: str


def clip_of(source: Source, card: ModelCard, given_up: Callable[[], bool] = never) -> UInt8[Tensor, "T 3 crop crop"]:
    """The frames a model sees of a video: what packing and evaluation would have made of it.

    VideoError when it cannot be used, and soon after `given_up` says that nobody waits for it any more.
    """
    modality = card.model.modality
    if isinstance(source, np.ndarray):
        indices = uniform_frame_indices(len(source), card.num_frames)
        chosen_TCHW = source[indices] if modality == "rgb" else motion_of_frames(source, indices, modality)
        frames_TCHW = torch.from_numpy(np.ascontiguousarray(chosen_TCHW))
        is_cropped = frames_TCHW.shape[-2:] == (card.crop, card.crop)
        return frames_TCHW if is_cropped else crop_clip(frames_TCHW, None, card.crop)
    if modality == "rgb":
        decoded = decode_clip(source, card.num_frames, card.short_side, given_up=given_up)
    else:
        decoded = decode_motion(source, card.num_frames, card.short_side, modality, given_up=given_up)
    return _as_packed(decoded.frames_THWC, card)


def clips_of(video: str, source: Source, card: ModelCard, windows: Windows | None) -> Iterator[SeenClip]:
    """The one clip of a video, or its windows one after the other; VideoError when it cannot be used."""
    if windows is None or isinstance(source, np.ndarray):
        yield SeenClip(video=video, start=None, end=None, frames_TCHW=clip_of(source, card))
        return
    if card.model.modality != "rgb":
        raise UserError(f"a model of {card.model.modality} sees whole videos: leave the windows out, or cut the video")
    for window in decode_windows(source, card.num_frames, card.short_side, windows.seconds, windows.stride):
        frames_TCHW = _as_packed(window.frames_THWC, card)
        yield SeenClip(video=video, start=window.start, end=window.end, frames_TCHW=frames_TCHW)


def read_ahead(
    sources: Iterable[Source], card: ModelCard, windows: Windows | None, num_threads: int
) -> Generator[SeenClip | UnusableVideo]:
    """The clips of all videos in order, decoded by threads while the caller computes.

    At most `num_threads` videos are open, and of each a few clips are held, whatever their number and length. Videos
    without a path are named by their place, from "0". Threads end with the iteration, however it ends.
    """
    numbered = enumerate(sources)
    opened: deque[_Opened] = deque()
    with _ended(opened):
        while True:
            while len(opened) < num_threads and (next_one := next(numbered, None)) is not None:
                place, source = next_one
                video = str(source) if isinstance(source, str | Path) else str(place)
                opened.append(_Opened(video, source, card, windows))
            if not opened:
                return
            clip = opened[0].next()
            if clip is None:
                opened.popleft()
            else:
                yield clip


class Decoders:
    """Threads that decode videos and do nothing else; a request that is over, done or not, keeps none of them."""

    def __init__(self, card: ModelCard, num_threads: int) -> None:
        self._card = card
        self._threads = ThreadPoolExecutor(num_threads, "decode")

    async def clip_of(self, video: bytes) -> UInt8[Tensor, "T 3 crop crop"]:
        """The frames that the model sees of a video; ValueError when it cannot be used."""
        is_over = threading.Event()
        work = partial(clip_of, video, self._card, given_up=is_over.is_set)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            is_over.set()


class _Opened:
    """A video that a thread of its own decodes."""

    def __init__(self, video: str, source: Source, card: ModelCard, windows: Windows | None) -> None:
        self._clips: queue.Queue[SeenClip | UnusableVideo | BaseException | None] = queue.Queue(_CLIPS_AHEAD)
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._decode, args=(video, source, card, windows), name="decode", daemon=True
        )
        self._thread.start()

    def next(self) -> SeenClip | UnusableVideo | None:
        """The next clip, waited for; None at the end. What went wrong in the thread is raised here."""
        clip = self._clips.get()
        if isinstance(clip, BaseException):
            raise clip
        return clip

    def end(self) -> None:
        """Stop decoding."""
        self._ended.set()
        self._thread.join()

    def _decode(self, video: str, source: Source, card: ModelCard, windows: Windows | None) -> None:
        try:
            for clip in clips_of(video, source, card, windows):
                if not self._put(clip):
                    return
        except VideoError as error:
            self._put(UnusableVideo(video=video, reason=str(error)))
        except BaseException as error:  # noqa: BLE001 - raised where the clip is asked for
            self._put(error)
        self._put(None)

    def _put(self, clip: SeenClip | UnusableVideo | BaseException | None) -> bool:
        while not self._ended.is_set():
            try:
                self._clips.put(clip, timeout=_SECONDS_BETWEEN_LOOKS)
            except queue.Full:
                continue
            return True
        return False


@contextmanager
def _ended(opened: "deque[_Opened]") -> Generator[None]:
    try:
        yield
    finally:
        for video in opened:
            video.end()


def _as_packed(frames_THWC: UInt8[np.ndarray, "T H W 3"], card: ModelCard) -> UInt8[Tensor, "T 3 crop crop"]:
    """Through the JPEG that packing would have made, and cropped as in evaluation; in memory the channels come last."""
    quality = int(card.provenance.get("jpeg_quality", _PACKED_QUALITY))
    packed = [decode_jpeg(encode_jpeg(torch.from_numpy(each).permute(2, 0, 1), quality)) for each in frames_THWC]
    frames_TCHW = torch.stack([frame.movedim(-3, -1) for frame in packed]).movedim(-1, -3)  # the decoder's own layout
    return crop_clip(frames_TCHW, None, card.crop)
