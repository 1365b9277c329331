"""Crops JPEGs before they are decoded, by leaving out the parts of their data that the crop does not need.

Packed JPEGs carry restart markers: the rows of blocks are cut into equal segments that can be decoded each alone. A
smaller JPEG is put together from the segments under the crop; its pixels are those of the whole one. Every decoder
reads both. A JPEG without such segments stays whole.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8

_FIRST_MARK = np.uint8(0xD0)  # of eight, in turn, each after 0xff
_END_OF_IMAGE = 0xD9
_END = bytes((0xFF, _END_OF_IMAGE))
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
        self._is_whole = True
        if not header.block_height:
            return
        tall, wide = header.block_height, header.segment_width
        rows, columns = _rounded_up(header.height, tall), _rounded_up(header.width, wide)
        rows_kept = range(max(0, top - _MARGIN) // tall, min(rows, _rounded_up(top + height + _MARGIN, tall)))
        # The left edge also keeps away from the image's right one: libjpeg colours a very narrow image less smoothly.
        first = max(0, min(left - _MARGIN, header.width - _LEAST_WIDTH)) // wide
        columns_kept = range(first, min(columns, _rounded_up(left + width + _MARGIN, wide)))
        self._num_segments = rows * columns
        self._is_whole = len(rows_kept) * len(columns_kept) == self._num_segments
        self.top, self.left = rows_kept[0] * tall, columns_kept[0] * wide
        self._kept_RS = np.array([[row * columns + column for column in columns_kept] for row in rows_kept])
        new_height = min(header.height, rows_kept[-1] * tall + tall) - self.top
        new_width = min(header.width, columns_kept[-1] * wide + wide) - self.left
        head = bytearray(header.content)
        struct.pack_into(">HH", head, header.size_at, new_height, new_width)
        self._head = bytes(head)
        # The marks after the segments, counted anew, and the end.
        self._marks_RS = (_FIRST_MARK + np.arange(self._kept_RS.size, dtype=np.uint8) % 8).reshape(self._kept_RS.shape)
        self._marks_RS[-1, -1] = _END_OF_IMAGE

    def crop(self, jpegs: Sequence[bytes | memoryview]) -> tuple[bytearray, list[int]]:
        """The smaller JPEGs one after the other, and the length of each. ValueError if one's data are not cut as the
        header says. All at once, since numpy's operators take their time whatever they work on."""
        whole, lengths = bytearray().join(jpegs), [len(jpeg) for jpeg in jpegs]
        if self._is_whole:
            return whole, lengths
        ends_T = np.cumsum(lengths)
        before_TS, after_TS = self._segments(np.frombuffer(whole, np.uint8), ends_T - lengths, ends_T)
        kept_TRS = after_TS[:, self._kept_RS]  # where the kept segments end
        row_from_TR, row_to_TR = before_TS[:, self._kept_RS[:, 0]], kept_TRS[:, :, -1] + 2  # with the mark after it
        # A row's segments are neighbours: it is copied in one piece.
        view = memoryview(whole)
        pieces: list[bytes | memoryview] = []
        for from_R, to_R in zip(row_from_TR.tolist(), row_to_TR.tolist(), strict=True):
            pieces.append(self._head)
            pieces += [view[start:stop] for start, stop in zip(from_R, to_R, strict=True)]
        cropped = bytearray().join(pieces)
        row_lengths_TR = row_to_TR - row_from_TR
        heads_T = len(self._head) * np.arange(1, len(jpegs) + 1)
        row_at_TR = (np.cumsum(row_lengths_TR) - row_lengths_TR.ravel()).reshape(row_lengths_TR.shape) + heads_T[
            :, None
        ]
        marks_at_TRS = kept_TRS + (row_at_TR - row_from_TR)[:, :, None]
        np.frombuffer(cropped, np.uint8)[marks_at_TRS + 1] = self._marks_RS
        return cropped, (row_lengths_TR.sum(axis=1) + len(self._head)).tolist()

    def _segments(
        self, data_L: UInt8[np.ndarray, " L"], starts_T: Int64[np.ndarray, " T"], ends_T: Int64[np.ndarray, " T"]
    ) -> tuple[Int64[np.ndarray, "T S"], Int64[np.ndarray, "T S"]]:
        """Where each segment of each JPEG begins, and where the mark after it does."""
        # Inside the data an 0xff byte is followed by a zero, or is the first one of a mark.
        marks_at = np.flatnonzero(data_L[:-1] == 0xFF)
        marks_at = marks_at[data_L[marks_at + 1] & ~np.uint8(7) == _FIRST_MARK]
        data_from_T, data_to_T = starts_T + len(self.header.content), ends_T - len(_END)
        first_T, last_T = np.searchsorted(marks_at, data_from_T), np.searchsorted(marks_at, data_to_T)
        if np.any(wrong := last_T - first_T != self._num_segments - 1):
            found = int((last_T - first_T)[wrong][0]) + 1
            raise ValueError(f"the JPEG has {found} segments, its header says {self._num_segments}")
        marks_at_TS = marks_at[first_T[:, None] + np.arange(self._num_segments - 1)]
        before_TS = np.concatenate([data_from_T[:, None], marks_at_TS + 2], axis=1)
        return before_TS, np.concatenate([marks_at_TS, data_to_T[:, None]], axis=1)


def _header_parts(jpeg: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Kind and place of each part of the header, the last of which starts the data."""
    at, kind = 2, 0
    while kind != _START_OF_SCAN and at + 12 <= len(jpeg) and jpeg[at] == 0xFF:
        kind = jpeg[at + 1]
        yield kind, at
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")


def _rounded_up(pixels: int, size: int) -> int:
    return -(-pixels // size)
