"""A video file becomes T frames, chosen exactly, or an error that says why it cannot."""

import io
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import UInt8
from torch.nn import functional as F

from tavlad.clip import BadClip, uniform_frame_indices

_UNCONVERTED_PIXELS = 64_000_000  # of frames kept as decoded: about 100 MB at 4:2:0
_PICTURES = ("_pipe", "image2")  # ends of the names of FFmpeg's formats of single pictures
_RIFF, _EBML, _SEGMENT = b"RIFF", b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


class VideoError(BadClip):
    """A video that cannot be used whole; `path` and `reason` say which and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # all arguments, so that it survives pickling between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedClip:
    """The chosen frames of a video and what the video was."""

    frames_THWC: UInt8[np.ndarray, "T H W 3"]
    """RGB, upright."""
    frame_indices: tuple[int, ...]
    """Which decoded frames these are, 0-based."""
    num_source_frames: int
    """Frames that the video decodes to; what its container claims is often off by some."""
    source_fps: float
    """Average frames per second by the container; 0 if it does not say."""
    width: int
    """Pixels of the source, upright."""
    height: int


def never() -> bool:
    """Nobody gives up."""
    return False


def decode_clip(
    source: str | Path | bytes,
    num_frames: int,
    short_side: int | None,
    suffix: str = "",
    given_up: Callable[[], bool] = never,
) -> DecodedClip:
    """Decodes `num_frames` frames, uniform over time, from a file or from its bytes.

    Frames are counted by decoding them all, in presentation order: containers are wrong (DivX files of HMDB51 claim one
    or two frames that do not exist). The short side becomes `short_side` pixels, or stays if it is shorter or None.
    `suffix`, such as ".avi", helps to recognise a file of which only the bytes are known. `given_up` is asked before
    each packet whether the frames are wanted no more: decoding ends then.
    Raises `VideoError` for whatever is missing, empty, truncated, damaged, no video, or given up.
    """
    _check_whole(source)
    # An upper bound on the frames, without decoding. It is off by at most two for nearly all videos, so one pass that
    # keeps the candidates of three counts is enough. Small ones are kept as decoded, and only the chosen are converted,
    # which costs more than decoding; of large ones only one count's are kept, converted and shrunk, for the memory.
    reader = _Reader(source, suffix, given_up)
    guess = max(1, sum(1 for _ in reader.packets()))
    is_small = 0 < 3 * num_frames * reader.num_pixels <= _UNCONVERTED_PIXELS
    guesses = range(max(1, guess - 2) if is_small else guess, guess + 1)
    wanted = {index for count in guesses for index in uniform_frame_indices(count, num_frames)}
    found = _decode(_Reader(source, suffix, given_up), wanted, short_side, convert_late=is_small)
    indices = uniform_frame_indices(found.num_frames, num_frames)
    if not found.frames.keys() >= set(indices):
        found = _decode(_Reader(source, suffix, given_up), set(indices), short_side, convert_late=False)
    return DecodedClip(
        frames_THWC=_converted(found.frames, indices, short_side),
        frame_indices=tuple(indices),
        num_source_frames=found.num_frames,
        source_fps=found.fps,
        width=found.width,
        height=found.height,
    )


def decode_frames_at(
    source: str | Path | bytes,
    indices: Sequence[int],
    short_side: int | None,
    suffix: str = "",
    given_up: Callable[[], bool] = never,
) -> UInt8[np.ndarray, "T H W 3"]:
    """The decoded frames of these numbers (0-based, ascending), as `decode_clip` gives them; decodes no further.

    Raises `VideoError` like `decode_clip`, and for a video that ends before the last of them.
    """
    reader = _Reader(source, suffix, given_up)
    found = _decode(reader, set(indices), short_side, convert_late=False, last=indices[-1])
    if found.num_frames <= indices[-1]:
        raise VideoError(reader.name, f"has {found.num_frames} frames, too few for frame {indices[-1]}")
    return _converted(found.frames, indices, short_side)


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A stretch of a video: T frames, uniform over its time."""

    start: float
    """Seconds from the video's first frame."""
    end: float
    frames_THWC: UInt8[np.ndarray, "T H W 3"]
    """RGB, upright."""


def decode_windows(
    source: str | Path | bytes, num_frames: int, short_side: int | None, seconds: float | int, stride: float | int
) -> Iterator[Window]:
    """Windows of `seconds`, one every `stride` seconds, in one pass whose memory does not grow with the video.

    The last one ends with the video, so that no time is left out; a video shorter than a window is one clip. A window's
    frames are those shown at start + k·seconds/T, which for a constant frame rate are the ones that `decode_clip` would
    choose from the window's frames. Raises `VideoError` as `decode_clip` does, when it gets there.
    """
    _check_whole(source)
    end = _last_moment(_Reader(source, ""))
    if end <= seconds:
        clip = decode_clip(source, num_frames, short_side)
        yield Window(start=0.0, end=end, frames_THWC=clip.frames_THWC)
        return
    waiting = deque(_Opened.at(start, min(seconds, end), num_frames) for start in window_starts(end, seconds, stride))
    opened: deque[_Opened] = deque()
    to_rgb = VideoReformatter()
    for shown_until, frame in _timed_frames(_Reader(source, "")):
        while waiting and waiting[0].times[0] < shown_until - _SECONDS_OF_ROUNDING:
            opened.append(waiting.popleft())
        if any(window.wants(shown_until) for window in opened):
            rgb_HWC = _upright_rgb(frame, short_side, to_rgb)
            for window in opened:
                while window.wants(shown_until):
                    window.frames.append(rgb_HWC)
        while opened and len(opened[0].frames) == num_frames:
            window = opened.popleft()
            yield Window(start=window.times[0], end=window.end, frames_THWC=np.stack(window.frames))


def window_starts(end: float | int, seconds: float | int, stride: float | int) -> list[float]:
    """Where windows begin in a video that ends at `end` seconds; ValueError for lengths that are not above 0.

    >>> window_starts(10.0, 4.0, 2.0), window_starts(9.0, 4.0, 2.0), window_starts(3.0, 4.0, 2.0)
    ([0.0, 2.0, 4.0, 6.0], [0.0, 2.0, 4.0, 5.0], [0.0])
    """
    if not (seconds > 0 and stride > 0):
        raise ValueError(f"a window of {seconds} s every {stride} s: both must be above 0")
    last = max(0.0, end - seconds)
    starts = [float(number * stride) for number in range(int(last / stride) + 1)]
    return starts if last - starts[-1] < _SECONDS_OF_ROUNDING else [*starts, last]


_SECONDS_OF_ROUNDING = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """A window that waits for frames: the moments it wants, and what was shown at them so far."""

    end: float
    times: list[float]
    frames: list[UInt8[np.ndarray, "H W 3"]] = field(default_factory=list[np.ndarray])

    @staticmethod
    def at(start: float, seconds: float | int, num_frames: int) -> "_Opened":
        times = [start + place * seconds / num_frames for place in range(num_frames)]
        return _Opened(end=start + seconds, times=times)

    def wants(self, until: float) -> bool:
        """Whether its next moment lies before `until`."""
        return len(self.frames) < len(self.times) and self.times[len(self.frames)] < until - _SECONDS_OF_ROUNDING


def _timed_frames(reader: "_Reader") -> "Iterator[tuple[float, av.VideoFrame]]":
    """Frames and the moment until which each is shown, in seconds from the first; the last one for ever."""
    before: av.VideoFrame | None = None
    first = 0.0
    for number, frame in enumerate(reader.frames()):
        moment = frame.time if frame.pts is not None else number / (reader.fps or _FRAMES_PER_SECOND)
        if before is None:
            first = moment
        elif (frame.width, frame.height) != (before.width, before.height):
            change = f"from {before.width}x{before.height} to {frame.width}x{frame.height}"
            raise VideoError(reader.name, f"the frame size changes {change} at frame {number}")
        else:
            yield moment - first, before
        before = frame
    if before is None:
        raise VideoError(reader.name, "not one frame can be decoded")
    yield float("inf"), before


_FRAMES_PER_SECOND = 25.0  # of a video that says nothing of time


def _last_moment(reader: "_Reader") -> float:
    """When the video ends, in seconds from its first frame, by its packets; above 0."""
    first, last, count = float("inf"), 0.0, 0
    for packet in reader.packets():
        count += 1
        moment = packet.pts if packet.pts is not None else packet.dts
        if moment is not None:
            first = min(first, float(moment * packet.time_base))
            last = max(last, float((moment + (packet.duration or 0)) * packet.time_base))
    return last - first if last > first else max(1, count) / (reader.fps or _FRAMES_PER_SECOND)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    frames: dict[int, "av.VideoFrame | UInt8[np.ndarray, 'H W 3']"]
    num_frames: int
    fps: float
    width: int
    height: int


def _decode(
    reader: "_Reader", wanted: Collection[int], short_side: int | None, *, convert_late: bool, last: int | None = None
) -> _Found:
    """One pass over the frames up to number `last`, or over all, keeping those wanted: converted, or as decoded."""
    frames: dict[int, av.VideoFrame | UInt8[np.ndarray, "H W 3"]] = {}
    num_frames, size = 0, (0, 0)
    to_rgb = VideoReformatter()
    for frame in reader.frames():
        size = size if num_frames else (frame.width, frame.height)
        if (frame.width, frame.height) != size:
            change = f"from {size[0]}x{size[1]} to {frame.width}x{frame.height}"
            raise VideoError(reader.name, f"the frame size changes {change} at frame {num_frames}")
        if num_frames in wanted:
            frames[num_frames] = frame if convert_late else _upright_rgb(frame, short_side, to_rgb)
        num_frames += 1
        if num_frames - 1 == last:
            break
    if not num_frames:
        raise VideoError(reader.name, "not one frame can be decoded")
    width, height = size if reader.quarter_turns % 2 == 0 else size[::-1]
    return _Found(frames=frames, num_frames=num_frames, fps=reader.fps, width=width, height=height)


def _converted(
    frames: "dict[int, av.VideoFrame | UInt8[np.ndarray, 'H W 3']]", indices: Sequence[int], short_side: int | None
) -> UInt8[np.ndarray, "T H W 3"]:
    """The frames of these numbers; a short video has some of them several times."""
    to_rgb = VideoReformatter()
    rgb: dict[int, UInt8[np.ndarray, "H W 3"]] = {}
    for index in set(indices):
        frame = frames[index]
        rgb[index] = _upright_rgb(frame, short_side, to_rgb) if isinstance(frame, av.VideoFrame) else frame
    return np.stack([rgb[index] for index in indices])


class _Reader:
    """Packets and frames of a file's main video stream; every failure of the decoder becomes a `VideoError`."""

    def __init__(self, source: str | Path | bytes, suffix: str, given_up: Callable[[], bool] = never) -> None:
        self._source = source
        self._suffix = suffix
        self._given_up = given_up
        self.name = _name_of(source)
        self.fps = 0.0
        self.num_pixels = 0
        self.quarter_turns = 0

    def packets(self) -> "Iterator[Packet[Any]]":
        """The packets that hold something, and the empty one that ends the stream is left out."""
        return (packet for packet in self._packets() if packet.size)

    def frames(self) -> Iterator[av.VideoFrame]:
        """Decoded frames in presentation order."""
        for packet in self._packets():
            try:
                frames = packet.decode()
            except (FFmpegError, EOFError) as error:
                raise VideoError(self.name, f"cannot be decoded to its end ({_plain(error)})") from error
            for frame in frames:
                assert isinstance(frame, av.VideoFrame)
                if frame.is_corrupt:
                    raise VideoError(self.name, "holds damaged frames, which the decoder could only guess")
                self.quarter_turns = _quarter_turns(frame)
                yield frame

    def _packets(self) -> "Iterator[Packet[Any]]":
        source = _NamedBytes(self._source, self._suffix) if isinstance(self._source, bytes) else str(self._source)
        try:
            # Some HMDB51 files carry metadata that is not UTF-8.
            with av.open(source, mode="r", metadata_errors="replace") as container:
                if container.format.name.endswith(_PICTURES):
                    raise VideoError(self.name, f"is a picture ({container.format.name}), not a video")
                stream = container.streams.best("video")
                if not isinstance(stream, av.VideoStream):
                    raise VideoError(self.name, "holds no video stream that can be decoded")
                if stream.disposition & Disposition.attached_pic:
                    raise VideoError(self.name, "holds sound and a cover picture, and no video")
                self.fps = float(stream.average_rate or 0)
                self.num_pixels = stream.codec_context.width * stream.codec_context.height
                stream.codec_context.thread_count = 1  # packing runs a process a core; and errors come in order
                for packet in container.demux(stream):
                    if self._given_up():
                        raise VideoError(self.name, "was given up before it was decoded")
                    if packet.is_corrupt:
                        raise VideoError(self.name, "is truncated or damaged: a packet of it is incomplete")
                    yield packet
        except (FFmpegError, EOFError, OSError) as error:
            raise VideoError(self.name, f"cannot be read as a video ({_plain(error)})") from error


class _NamedBytes(io.BytesIO):
    """A file's bytes; FFmpeg asks for the name, whose suffix tells some containers from others."""

    def __init__(self, content: bytes, suffix: str) -> None:
        super().__init__(content)
        self.name = f"video{suffix}"


def _upright_rgb(frame: av.VideoFrame, short_side: int | None, to_rgb: VideoReformatter) -> UInt8[np.ndarray, "H W 3"]:
    """8-bit RGB whatever the pixel format, turned as the file asks, resized with antialiasing."""
    # One converter for all frames, and one thread: starting threads costs more than a small frame, and a packing
    # process has one core.
    decoded_HWC = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
    rgb_HWC = np.rot90(decoded_HWC, _quarter_turns(frame))
    height, width = rgb_HWC.shape[:2]
    shortest = min(height, width)
    if short_side is None or shortest <= short_side:
        return np.ascontiguousarray(rgb_HWC)
    size = (round(height * short_side / shortest), round(width * short_side / shortest))
    frame_1CHW = torch.from_numpy(np.ascontiguousarray(rgb_HWC)).permute(2, 0, 1)[None]
    resized_1CHW = F.interpolate(frame_1CHW, size=size, mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized_1CHW[0].permute(1, 2, 0).numpy())


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns that make the frame upright (phones film upright with a rotation flag)."""
    return round(frame.rotation / 90) % 4


def _check_whole(source: str | Path | bytes) -> None:
    """A missing, empty or cut file is told before any decoding; demuxers read a cut AVI or Matroska without a word."""
    name = _name_of(source)
    try:
        if isinstance(source, bytes):
            head, size = source[:64], len(source)
        else:
            with Path(source).open("rb") as file:
                head, size = file.read(64), Path(source).stat().st_size
    except FileNotFoundError as error:
        raise VideoError(name, "does not exist") from error
    except OSError as error:
        raise VideoError(name, f"cannot be opened ({error.strerror})") from error
    if not size:
        raise VideoError(name, "is empty (0 bytes)")
    claimed = _claimed_size(head)
    if claimed > size:
        raise VideoError(name, f"is truncated: it says it has {claimed} bytes and has {size}")


def _claimed_size(head: bytes) -> int:
    """Bytes that an AVI or Matroska file says it has at least; 0 where it does not say."""
    if head.startswith(_RIFF):
        return int.from_bytes(head[4:8], "little") + 8
    segment = head.find(_SEGMENT)
    if not head.startswith(_EBML) or not 0 <= segment < 48:
        return 0
    # EBML: the number of leading zero bits is the number of bytes after the first; all ones is "unknown" (a live file).
    first = segment + len(_SEGMENT)
    length = 9 - head[first].bit_length()
    value = int.from_bytes(head[first : first + length], "big") - (1 << 7 * length)
    return 0 if value == (1 << 7 * length) - 1 else first + length + value


def _name_of(source: str | Path | bytes) -> str:
    return f"a video of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _plain(error: Exception) -> str:
    """The reason in a decoder's error, without its number and the path."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text).rstrip(".").lower()
