"""Crops a JPEG before it is decoded, by leaving out the parts of its data that the crop does not need.

Packed JPEGs carry restart markers: the rows of blocks are cut into equal segments that can be decoded each alone. A
smaller JPEG is put together from the segments under the crop; its pixels are those of the whole one. Every decoder
reads both. A JPEG without such segments is given back as it is.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

_RESTART = re.compile(rb"\xff[\xd0-\xd7]")  # inside the data any other 0xff byte is followed by a zero
_MARKS = [bytes((0xFF, 0xD0 + number)) for number in range(8)]
_END = b"\xff\xd9"
_MARGIN = 2  # pixels: smooth colour upsampling looks at its neighbours
_SEGMENTS_A_ROW = 8
_BASELINE, _RESTART_INTERVAL, _START_OF_SCAN = 0xC0, 0xDD, 0xDA


class CroppedJpeg(NamedTuple):
    """A JPEG, and where its top left pixel was in the whole one."""

    jpeg: bytes | memoryview
    top: int
    left: int


class _Header(NamedTuple):
    size_at: int
    data_at: int
    height: int
    width: int
    block_height: int
    segment_width: int


def restart_interval(width: int, block_width: int = 16) -> int:
    """Blocks of a segment, for an image this wide: cuts every row of blocks into about eight equal segments."""
    blocks = -(-width // block_width)
    divisors = [each for each in range(1, blocks + 1) if blocks % each == 0]
    return min(divisors, key=lambda each: (abs(blocks / each - _SEGMENTS_A_ROW), each))


def jpeg_size(jpeg: bytes | memoryview) -> tuple[int, int]:
    """Height and width in pixels. ValueError if it is no JPEG."""
    for kind, at in _segments(jpeg):
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return struct.unpack_from(">HH", jpeg, at + 5)
    raise ValueError("this is not a JPEG")


def crop_jpeg(jpeg: bytes | memoryview, top: int, left: int, height: int, width: int) -> CroppedJpeg:
    """A JPEG that shows at least this rectangle, which must lie inside, with the same pixels there."""
    header = _header(jpeg)
    if header is None:
        return CroppedJpeg(jpeg, 0, 0)
    rows, columns = _blocks(header.height, header.block_height), _blocks(header.width, header.segment_width)
    first_row, first_column = (
        max(0, top - _MARGIN) // header.block_height,
        max(0, left - _MARGIN) // header.segment_width,
    )
    end_row = min(rows, _blocks(top + height + _MARGIN, header.block_height))
    end_column = min(columns, _blocks(left + width + _MARGIN, header.segment_width))
    segments = _RESTART.split(jpeg[header.data_at : -len(_END)])
    if len(segments) != rows * columns or (end_row - first_row, end_column - first_column) == (rows, columns):
        return CroppedJpeg(jpeg, 0, 0)
    kept = [
        segment
        for row in range(first_row, end_row)
        for segment in segments[row * columns + first_column : row * columns + end_column]
    ]
    pieces = [_END] * (2 * len(kept))
    pieces[0::2] = kept
    pieces[1:-1:2] = (_MARKS * (len(kept) // 8 + 1))[: len(kept) - 1]
    top, left = first_row * header.block_height, first_column * header.segment_width
    head = bytearray(jpeg[: header.data_at])
    size = (
        min(header.height, end_row * header.block_height) - top,
        min(header.width, end_column * header.segment_width) - left,
    )
    struct.pack_into(">HH", head, header.size_at, *size)
    return CroppedJpeg(b"".join([head, *pieces]), top, left)


def _header(jpeg: bytes | memoryview) -> _Header | None:
    """None unless it is a baseline JPEG of one scan whose rows of blocks are whole numbers of restart segments."""
    size_at, sampling, components, interval, at = 0, 0, 0, 0, 0
    for kind, at in _segments(jpeg):
        if kind == _BASELINE:
            size_at, components, sampling = at + 5, jpeg[at + 9], jpeg[at + 11]
        elif kind == _RESTART_INTERVAL:
            interval = int.from_bytes(jpeg[at + 4 : at + 6], "big")
    if not (size_at and interval and components == 3 and bytes(jpeg[-2:]) == _END):
        return None
    height, width = struct.unpack_from(">HH", jpeg, size_at)
    block_height, block_width = (sampling & 15) * 8, (sampling >> 4) * 8
    if _blocks(width, block_width) % interval:
        return None
    data_at = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return _Header(size_at, data_at, height, width, block_height, interval * block_width)


def _segments(jpeg: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Kind and place of each header segment, up to the start of the data."""
    at, kind = 2, 0
    while kind != _START_OF_SCAN and at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        kind = jpeg[at + 1]
        yield kind, at
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def _blocks(pixels: int, size: int) -> int:
    return -(-pixels // size)
