"""Crops JPEGs before they are decoded, by leaving out the parts of their data that the crop does not need.

Packed JPEGs carry restart markers: the rows of blocks are cut into equal segments that can be decoded each alone. A
smaller JPEG is put together from the segments under the crop; its pixels are those of the whole one. Every decoder
reads both. A JPEG without such segments stays whole.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")  # inside the data any other 0xff byte is followed by a zero
_MARKS = [bytes((0xFF, 0xD0 + number)) for number in range(8)]
_END = b"\xff\xd9"
_MARGIN = 2  # pixels: smooth colour upsampling looks at its neighbours
_LEAST_WIDTH = 8  # pixels
_SEGMENTS_A_ROW = 8
_BASELINE, _RESTART_INTERVAL, _START_OF_SCAN = 0xC0, 0xDD, 0xDA
_NO_FRAME_HEADERS = (0xC4, 0xC8, 0xCC)


def restart_interval(width: int, block_width: int = 16) -> int:
    """Blocks of a segment, for an image this wide: cuts every row of blocks into about eight equal segments."""
    blocks = _rounded_up(width, block_width)
    divisors = [each for each in range(1, blocks + 1) if blocks % each == 0]
    return min(divisors, key=lambda each: (abs(blocks / each - _SEGMENTS_A_ROW), each))


@dataclass(frozen=True, kw_only=True, slots=True)
class JpegHeader:
    """What stands before the data of a JPEG, the same for all frames of a clip."""

    content: bytes
    height: int
    width: int
    size_at: int
    """Where height and width stand."""
    block_height: int
    """In pixels; 0 if the data are not cut into rows and columns of segments."""
    segment_width: int
    """In pixels."""

    @classmethod
    def of(cls, jpeg: bytes | memoryview) -> "JpegHeader":
        """The header of a JPEG. ValueError if it is none."""
        size_at, sampling, interval, at = 0, 0, 0, 0
        is_cut = False
        for kind, at in _header_parts(jpeg):
            if 0xC0 <= kind <= 0xCF and kind not in _NO_FRAME_HEADERS:
                size_at, sampling = at + 5, jpeg[at + 11]
                is_cut = kind == _BASELINE and jpeg[at + 9] == 3  # three colours in one scan
            elif kind == _RESTART_INTERVAL:
                interval = int.from_bytes(jpeg[at + 4 : at + 6], "big")
        if not size_at:
            raise ValueError("this is not a JPEG")
        height, width = struct.unpack_from(">HH", jpeg, size_at)
        block_height, block_width = (sampling & 15) * 8, (sampling >> 4) * 8
        is_cut = is_cut and interval > 0 and _rounded_up(width, block_width) % interval == 0
        return cls(
            content=bytes(jpeg[: at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]),
            height=height,
            width=width,
            size_at=size_at,
            block_height=block_height if is_cut else 0,
            segment_width=interval * block_width,
        )

    def begins(self, jpeg: bytes | memoryview) -> bool:
        """Whether this is the header of the JPEG."""
        return jpeg[: len(self.content)] == self.content


class JpegCrop:
    """Makes smaller JPEGs, which show at least a rectangle, of all JPEGs with one header."""

    def __init__(self, header: JpegHeader, top: int, left: int, height: int, width: int) -> None:
        self.header = header
        self.top, self.left = 0, 0
        """Where the top left pixel of the smaller JPEGs is in the whole ones."""
        if not header.block_height:
            self._kept = None
            return
        tall, wide = header.block_height, header.segment_width
        rows, columns = _rounded_up(header.height, tall), _rounded_up(header.width, wide)
        rows_kept = range(max(0, top - _MARGIN) // tall, min(rows, _rounded_up(top + height + _MARGIN, tall)))
        # The left edge also keeps away from the image's right one: libjpeg colours a very narrow image less smoothly.
        first = max(0, min(left - _MARGIN, header.width - _LEAST_WIDTH)) // wide
        columns_kept = range(first, min(columns, _rounded_up(left + width + _MARGIN, wide)))
        self._num_segments = rows * columns
        self._kept = [slice(row * columns + columns_kept[0], row * columns + columns_kept[-1] + 1) for row in rows_kept]
        num_kept = len(rows_kept) * len(columns_kept)
        if num_kept == self._num_segments:
            self._kept = None
            return
        self.top, self.left = rows_kept[0] * tall, columns_kept[0] * wide
        new_height = min(header.height, rows_kept[-1] * tall + tall) - self.top
        new_width = min(header.width, columns_kept[-1] * wide + wide) - self.left
        head = bytearray(header.content)
        struct.pack_into(">HH", head, header.size_at, new_height, new_width)
        # What stands before, between and after the segments: the header, the marks counted anew, and the end.
        self._frame = [bytes(head), *(b"" for _ in range(2 * num_kept))]
        self._frame[2::2] = [*(_MARKS[number % 8] for number in range(num_kept - 1)), _END]

    def crop(self, jpeg: bytes | memoryview) -> bytes | memoryview:
        """The smaller JPEG. ValueError if its data are not cut as its header says."""
        if self._kept is None:
            return jpeg
        segments = _RESTART.split(jpeg[len(self.header.content) : -len(_END)])
        if len(segments) != self._num_segments:
            raise ValueError(f"the JPEG has {len(segments)} segments, its header says {self._num_segments}")
        pieces = self._frame.copy()
        pieces[1::2] = [segment for row in self._kept for segment in segments[row]]
        return b"".join(pieces)


def _header_parts(jpeg: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Kind and place of each part of the header, the last of which starts the data."""
    at, kind = 2, 0
    while kind != _START_OF_SCAN and at + 12 <= len(jpeg) and jpeg[at] == 0xFF:
        kind = jpeg[at + 1]
        yield kind, at
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def _rounded_up(pixels: int, size: int) -> int:
    return -(-pixels // size)
