"""A JPEG cropped before decoding has, under the crop, the very pixels of the whole one."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.clip_bytes import decode_jpeg, encode_jpeg
from shards.jpeg_crop import JpegCrop, JpegHeader, restart_interval


def picture(height: int, width: int) -> torch.Tensor:
    """Smooth waves and noise, so that neighbours differ."""
    noise = torch.randint(0, 60, (3, height, width), generator=torch.Generator().manual_seed(height * 1000 + width))
    waves = torch.linspace(0, 150, height)[:, None] * torch.linspace(0, 1, width)[None]
    return (waves + noise).to(torch.uint8)


def cropped(crop: JpegCrop, jpeg: bytes) -> bytes:
    data, (length,) = crop.crop([jpeg])
    assert length == len(data)
    return bytes(data)


@settings(max_examples=120, deadline=None)
@given(height=st.integers(1, 130), width=st.integers(1, 180), data=st.data())
def test_cropped_jpeg_has_the_pixels_of_the_whole_one(height: int, width: int, data: st.DataObject) -> None:
    jpeg = encode_jpeg(picture(height, width), 90)
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    tall, wide = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    crop = JpegCrop(JpegHeader.of(jpeg), top, left, tall, wide)
    whole, part = decode_jpeg(jpeg), decode_jpeg(cropped(crop, jpeg))
    y, x = top - crop.top, left - crop.left
    assert torch.equal(part[:, y : y + tall, x : x + wide], whole[:, top : top + tall, left : left + wide])


@pytest.mark.parametrize("width", range(14, 40))
def test_narrow_strip_at_the_right_edge_keeps_its_colours(width: int) -> None:
    jpeg = encode_jpeg(picture(20, width), 90)
    whole = decode_jpeg(jpeg)
    for left in range(width):
        crop = JpegCrop(JpegHeader.of(jpeg), 0, left, 1, width - left)
        part = decode_jpeg(cropped(crop, jpeg))
        assert torch.equal(part[:, 0, left - crop.left :], whole[:, 0, left:]), left


def test_many_are_cropped_as_each_alone() -> None:
    jpegs = [encode_jpeg(picture(96, 128) // (1 + number), 90) for number in range(5)]
    crop = JpegCrop(JpegHeader.of(jpegs[0]), 20, 30, 40, 50)
    data, lengths = crop.crop([memoryview(jpeg) for jpeg in jpegs])
    assert lengths == [len(cropped(crop, jpeg)) for jpeg in jpegs]
    assert data == b"".join(cropped(crop, jpeg) for jpeg in jpegs)


def test_jpeg_with_other_segments_than_its_header_says_is_refused() -> None:
    jpegs = [encode_jpeg(picture(96, 128), 90) for _ in range(3)]
    jpegs[1] = jpegs[1].replace(b"\xff\xd3", b"\x00\x00", 1)
    segments = 6 * 8
    with pytest.raises(ValueError, match=f"has {segments - 1} segments, its header says {segments}"):
        JpegCrop(JpegHeader.of(jpegs[0]), 20, 30, 40, 50).crop(jpegs)


def test_small_crop_leaves_most_of_the_data_out() -> None:
    jpeg = encode_jpeg(picture(256, 340), 90)
    crop = JpegCrop(JpegHeader.of(jpeg), 44, 86, 168, 168)
    assert len(cropped(crop, jpeg)) < 0.6 * len(jpeg)
    assert decode_jpeg(cropped(crop, jpeg)).shape[1] < 210


def test_segments_cut_rows_evenly() -> None:
    assert [restart_interval(width) for width in (16, 320, 340, 388, 272)] == [1, 2, 2, 5, 17]
    for width in range(1, 700):
        assert -(-width // 16) % restart_interval(width) == 0


@pytest.mark.parametrize("kind", ["no markers", "progressive", "grey", "full colour"])
def test_any_other_jpeg_is_read_too(kind: str) -> None:
    """What other programs wrote, or this one before it knew of markers."""
    options: dict[str, object] = {
        "no markers": {},
        "progressive": {"progressive": True, "restart_marker_blocks": 2},
        "grey": {"restart_marker_blocks": 2},
        "full colour": {"subsampling": 0, "restart_marker_blocks": 4},
    }[kind]
    image = Image.fromarray(picture(96, 128).movedim(0, -1).numpy())
    buffer = io.BytesIO()
    (image.convert("L") if kind == "grey" else image).save(buffer, "JPEG", quality=90, **options)
    jpeg = buffer.getvalue()
    crop = JpegCrop(JpegHeader.of(jpeg), 30, 40, 32, 32)
    assert (len(cropped(crop, jpeg)) < len(jpeg)) == (kind == "full colour")
    part = decode_jpeg(cropped(crop, jpeg))[:, 30 - crop.top : 62 - crop.top, 40 - crop.left : 72 - crop.left]
    assert torch.equal(part, decode_jpeg(jpeg)[:, 30:62, 40:72])


def test_what_is_no_jpeg_says_so() -> None:
    for data in (b"", b"RIFF" * 10, b"\xff\xd8\xff"):
        with pytest.raises(ValueError, match="not a JPEG"):
            JpegHeader.of(data)


def test_header_is_recognised_in_the_clips_other_frames() -> None:
    one, other, larger = (encode_jpeg(picture(*size), 90) for size in ((64, 80), (64, 80), (80, 80)))
    header = JpegHeader.of(memoryview(one))
    assert (header.height, header.width) == (64, 80)
    assert header.begins(memoryview(other))
    assert not header.begins(larger)
