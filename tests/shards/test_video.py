"""A video gives exactly its uniform decoded frames, or an error that says why not."""

import pickle
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from shards.video import VideoError, _Reader, decode_clip, decode_windows, window_starts
from tavlad.clip import uniform_frame_indices


def numbers_of(path: Path | bytes, num_samples: int, numbered) -> list[int]:
    return [numbered.read(frame_HWC) for frame_HWC in decode_clip(path, num_samples, None).frames_THWC]


@pytest.mark.parametrize("num_frames", [1, 3, 24, 25, 26, 61])
@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("avi", "mpeg4", {"bf": "2"}),
        ("mp4", "h264", {"bf": "3", "g": "12"}),
        ("mkv", "h264", {"bf": "0"}),
        ("mpg", "mpeg2video", {"bf": "2"}),
    ],
)
def test_frame_i_is_decoded_frame_floor_of_linspace(
    suffix: str, codec: str, options: dict[str, str], num_frames: int, tmp_path: Path, numbered
) -> None:
    path = numbered.write(tmp_path / f"v.{suffix}", num_frames, codec=codec, options=options)
    clip = decode_clip(path, 25, None)
    expected = [int(np.floor(i * num_frames / 25 + 1e-9)) for i in range(25)]
    assert [numbered.read(frame_HWC) for frame_HWC in clip.frames_THWC] == expected
    assert list(clip.frame_indices) == expected
    assert (clip.num_source_frames, clip.width, clip.height) == (num_frames, 64, 48)
    assert clip.source_fps == 25 or (suffix == "mpg" and num_frames == 1)  # which has no rate


def test_variable_frame_rate_counts_frames_not_seconds(tmp_path: Path, numbered) -> None:
    times = [0, 1, 2, 3, 4, 5, 50, 51, 90, 200, 201, 260]
    path = numbered.write(tmp_path / "v.mkv", 12, codec="h264", options={"bf": "0"}, times=times)
    assert numbers_of(path, 4, numbered) == [0, 3, 6, 9]


def test_frames_that_the_container_counts_but_cannot_be_decoded_do_not_count(tmp_path: Path, numbered) -> None:
    whole = numbered.write(tmp_path / "whole.mp4", 60, codec="h264", options={"g": "20", "sc_threshold": "0"})
    cut = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if number >= 7 and packet.dts is not None:  # the first key frame is lost, so frames 0 to 19 are
                packet.stream = stream
                target.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 53
    clip = decode_clip(cut, 8, None)
    assert clip.num_source_frames == 40
    assert [numbered.read(frame_HWC) for frame_HWC in clip.frames_THWC] == [20, 25, 30, 35, 40, 45, 50, 55]


def test_bytes_decode_like_the_file(tmp_path: Path, numbered) -> None:
    path = numbered.write(tmp_path / "v.mp4", 30, codec="h264")
    from_file, from_bytes = decode_clip(path, 5, 32), decode_clip(path.read_bytes(), 5, 32)
    assert np.array_equal(from_file.frames_THWC, from_bytes.frames_THWC)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((48, 64), 32, (32, 43)), ((64, 48), 32, (43, 32)), ((48, 64), 48, (48, 64)), ((48, 64), 100, (48, 64))],
)
def test_short_side_shrinks_and_never_grows(
    size: tuple[int, int], short_side: int, expected: tuple[int, int], tmp_path: Path, numbered
) -> None:
    path = numbered.write_frames(tmp_path / "v.mp4", [numbered.draw(5, *size)] * 3, codec="h264")
    clip = decode_clip(path, 2, short_side)
    assert clip.frames_THWC.shape == (2, *expected, 3)
    assert (clip.height, clip.width) == size


def test_shrinking_does_not_alias(tmp_path: Path, numbered) -> None:
    bright_W = np.arange(256) % 4 == 0  # a quarter of the columns: without antialiasing none of them is met
    frame_HWC = np.tile(bright_W[None, :, None] * 255, (256, 1, 3)).astype(np.uint8)
    path = numbered.write_frames(tmp_path / "v.avi", [frame_HWC] * 2, codec="ffv1", pixels="bgr0")
    shrunk = decode_clip(path, 1, 64).frames_THWC
    assert np.abs(shrunk.astype(int) - 64).max() < 20


@pytest.mark.parametrize(
    ("codec", "pixels"),
    [
        ("ffv1", "gray"),
        ("ffv1", "gray10le"),
        ("ffv1", "yuv420p10le"),
        ("ffv1", "yuva420p"),
        ("ffv1", "bgra"),
        ("ffv1", "yuv444p16le"),
        ("libx265", "yuv420p10le"),
        ("libvpx-vp9", "yuva420p"),
        ("mjpeg", "yuvj422p"),
    ],
)
def test_every_pixel_format_ends_as_rgb(codec: str, pixels: str, tmp_path: Path, numbered) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    frames = [numbered.draw(10 * index + 5, 49 if codec == "ffv1" else 48, 64) for index in range(6)]
    path = numbered.write_frames(tmp_path / "v.mkv", frames, codec=codec, pixels=pixels, options=options)
    clip = decode_clip(path, 3, None)
    assert clip.frames_THWC.dtype == np.uint8
    assert [numbered.read(frame_HWC) for frame_HWC in clip.frames_THWC] == [5, 25, 45]
    assert np.abs(clip.frames_THWC.astype(int) - np.stack(frames)[[0, 2, 4]]).mean() < 12


def test_odd_sizes_are_kept(tmp_path: Path, numbered) -> None:
    frames = [np.full((37, 51, 3), 90, np.uint8)] * 3
    path = numbered.write_frames(tmp_path / "v.mkv", frames, codec="ffv1", pixels="yuv420p")
    assert decode_clip(path, 2, None).frames_THWC.shape == (2, 37, 51, 3)
    assert decode_clip(path, 2, 25).frames_THWC.shape == (2, 25, 34, 3)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_rotation_flag_turns_the_frames_upright(turns: int, tmp_path: Path, numbered) -> None:
    """The matrix in an MP4's track header maps the stored pixel (x, y) to (a x + c y, b x + d y) on the screen."""
    upright_HWC = np.zeros((48, 64, 3), np.uint8)
    upright_HWC[:24, :32] = (255, 0, 0)
    upright_HWC[24:, :32] = (0, 0, 255)
    # A camera held a quarter turn counter-clockwise stores the scene a quarter turn clockwise; (x, y) -> (y, -x) undoes
    # that.
    stored_HWC = np.rot90(upright_HWC, -turns)
    a, b, c, d = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)][turns]
    path = numbered.write_frames(tmp_path / "v.mp4", [np.ascontiguousarray(stored_HWC)] * 3, codec="h264")
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    for place, value in ((0, a), (4, b), (12, c), (16, d)):
        content[start + place : start + place + 4] = (value * 65536 % 2**32).to_bytes(4, "big")
    path.write_bytes(content)
    clip = decode_clip(path, 1, None)
    assert (clip.height, clip.width) == (48, 64)
    assert np.abs(clip.frames_THWC[0].astype(int) - upright_HWC).mean() < 12


def test_metadata_that_is_not_utf8_does_not_matter(tmp_path: Path, numbered) -> None:
    path = tmp_path / "v.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLETITLE"
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for index in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered.draw(index), format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content.count(b"TITLETITLE") == 1
    path.write_bytes(content.replace(b"TITLETITLE", b"caf\xe9 \xff\xfe\xfdab"))
    assert numbers_of(path, 4, numbered) == [0, 1, 2, 3]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.8, 0.97, 0.995])
@pytest.mark.parametrize(
    ("suffix", "codec"), [("avi", "mpeg4"), ("avi", "h264"), ("mp4", "h264"), ("mkv", "h264"), ("webm", "libvpx-vp9")]
)
def test_truncated_file_is_an_error_not_a_shorter_clip(
    suffix: str, codec: str, fraction: float, tmp_path: Path, numbered
) -> None:
    content = numbered.write(tmp_path / f"whole.{suffix}", 60, codec=codec).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(content[: int(fraction * len(content))])
    if (suffix, fraction) == ("mp4", 0.995):  # only the end of the header is lost, which is of no consequence
        assert decode_clip(path, 25, None).num_source_frames == 60
        return
    with pytest.raises(VideoError, match=r"cut\..*: (is truncated|cannot be|holds no video|not one frame)"):
        decode_clip(path, 25, None)


def test_mp4_with_its_header_in_front_cut_short_is_an_error(tmp_path: Path, numbered) -> None:
    frames = [np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8) for index in range(30)]
    for container in ("mov_flags", "whole"):
        path = tmp_path / f"{container}.mp4"
        numbered.write_frames(path, frames, codec="mpeg4")
    content = path.read_bytes()
    start = content.index(b"moov") - 4
    moov = content[start:]
    media = content.index(b"mdat") - 4
    assert media < start
    # Move the header in front of the media, as web players want it, and its offsets with it.
    moved = bytearray(moov)
    chunk = moved.index(b"stco") + 8
    for entry in range(int.from_bytes(moved[chunk : chunk + 4], "big")):
        place = slice(chunk + 4 + 4 * entry, chunk + 8 + 4 * entry)
        moved[place] = (int.from_bytes(moved[place], "big") + len(moov)).to_bytes(4, "big")
    fast = content[:media] + bytes(moved) + content[media:start]
    path.write_bytes(fast)
    assert decode_clip(path, 5, None).num_source_frames == 30
    path.write_bytes(fast[: int(0.7 * len(fast))])
    with pytest.raises(VideoError, match="truncated"):
        decode_clip(path, 5, None)


def test_damaged_frames_are_an_error(tmp_path: Path, numbered) -> None:
    frames = [np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8) for index in range(20)]
    content = bytearray(numbered.write_frames(tmp_path / "whole.avi", frames, codec="mpeg4").read_bytes())
    for place in range(len(content) // 3, 2 * len(content) // 3, 997):
        content[place] ^= 0xFF
    path = tmp_path / "damaged.avi"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"damaged\.avi: (holds damaged frames|cannot be decoded)"):
        decode_clip(path, 5, None)


def test_frame_size_that_changes_is_an_error(tmp_path: Path, numbered) -> None:
    parts = [
        numbered.write_frames(tmp_path / f"{size}.mjpeg", frames, codec="mjpeg", pixels="yuvj420p").read_bytes()
        for size in (48, 64)
        for frames in ([numbered.draw(1, size, 64)] * 5,)
    ]
    path = tmp_path / "both.mjpeg"
    path.write_bytes(b"".join(parts))
    with pytest.raises(VideoError, match=r"both\.mjpeg: the frame size changes from 64x48 to 64x64"):
        decode_clip(path, 5, None)


def test_what_is_no_video_is_an_error_that_says_so(tmp_path: Path) -> None:
    empty, text, sound = tmp_path / "empty.mp4", tmp_path / "text.mp4", tmp_path / "sound.wav"
    empty.touch()
    text.write_text("no video\n" * 100)
    with wave.open(str(sound), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(16000))
    for path, reason in (
        (tmp_path / "absent.mp4", "does not exist"),
        (tmp_path, "cannot be opened"),
        (empty, r"is empty \(0 bytes\)"),
        (text, "cannot be read as a video"),
        (sound, "holds no video stream"),
    ):
        with pytest.raises(VideoError, match=f"{path}: {reason}") as caught:
            decode_clip(path, 5, None)
        assert caught.value.path == str(path)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(("suffix", "codec"), [("h264", "h264"), ("ts", "mpeg2video"), ("live.mkv", "h264")])
def test_container_that_does_not_count_its_frames_is_counted(suffix: str, codec: str, tmp_path: Path, numbered) -> None:
    path = tmp_path / f"v.{suffix}"
    numbered.write(path, 37, codec=codec, options={"bf": "2", "g": "9"})
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    clip = decode_clip(path, 25, None)
    assert clip.num_source_frames == 37
    assert [numbered.read(frame_HWC) for frame_HWC in clip.frames_THWC] == uniform_frame_indices(37, 25)


def test_interlaced_frames_are_counted_as_frames(tmp_path: Path, numbered) -> None:
    path = tmp_path / "v.mpg"
    numbered.write(path, 31, codec="mpeg2video", options={"flags": "+ilme+ildct", "bf": "2", "field_order": "tt"})
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert numbers_of(path, 25, numbered) == uniform_frame_indices(31, 25)


def write_sound(path: Path, cover: np.ndarray | None = None) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        picture = None
        if cover is not None:
            picture = container.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = *cover.shape[:2], "yuvj420p"
            picture.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        if picture is not None:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            container.mux(picture.encode())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_sound_alone_or_with_a_cover_is_no_video(tmp_path: Path, numbered) -> None:
    with pytest.raises(VideoError, match="holds no video stream"):
        decode_clip(write_sound(tmp_path / "sound.mp4"), 5, None)
    with pytest.raises(VideoError, match="holds sound and a cover picture, and no video"):
        decode_clip(write_sound(tmp_path / "song.mp4", numbered.draw(1)), 5, None)


@pytest.mark.parametrize(("codec", "pixels"), [("png", "rgb24"), ("mjpeg", "yuvj420p"), ("bmp", "bgr24")])
def test_picture_renamed_is_no_video(codec: str, pixels: str, tmp_path: Path, numbered) -> None:
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 48, pixels, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(numbered.draw(1), format="rgb24").reformat(format=pixels)
    frame.pts, frame.time_base = 0, Fraction(1, 25)
    path = tmp_path / "holiday.mp4"
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))
    with pytest.raises(VideoError, match=r"holiday\.mp4: is a picture \(.*_pipe\), not a video"):
        decode_clip(path, 5, None)


@pytest.mark.parametrize("lies", [0, 2, 5])
def test_frames_kept_for_the_wrong_count_are_decoded_again(
    lies: int, tmp_path: Path, numbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large videos are kept for one count of frames, small ones for three; a count that is off costs a second pass."""
    path = numbered.write(tmp_path / "v.mp4", 40, codec="h264")
    packets = _Reader.packets
    monkeypatch.setattr(_Reader, "packets", lambda self: [*packets(self), *[None] * lies])
    small = decode_clip(path, 9, 24)
    monkeypatch.setattr("shards.video._UNCONVERTED_PIXELS", 0)
    large = decode_clip(path, 9, 24)
    assert np.array_equal(small.frames_THWC, large.frames_THWC)
    assert list(small.frame_indices) == list(large.frame_indices) == uniform_frame_indices(40, 9)
    assert small.num_source_frames == large.num_source_frames == 40


@pytest.mark.slow
def test_memory_does_not_grow_with_the_size_and_number_of_frames(tmp_path: Path, numbered) -> None:
    """25 frames of 4K are 620 MB of RGB, and 310 MB as decoded; decoding must hold a few at a time."""
    frames = [numbered.draw(index, 2160, 3840) for index in range(4)]
    path = numbered.write_frames(tmp_path / "4k.mp4", frames * 15, codec="mpeg4")
    program = f"""
from pathlib import Path
from shards.video import decode_clip

def peak_mib():  # of this program alone; getrusage's begins at its parent's
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024

decode_clip({str(numbered.write(tmp_path / "small.mp4", 3, codec="mpeg4"))!r}, 25, 256)
before = peak_mib()
clip = decode_clip({str(path)!r}, 25, 256)
assert clip.frames_THWC.shape == (25, 256, 455, 3) and clip.num_source_frames == 60
print(peak_mib() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200, "MiB above a small video's"


def test_real_videos_have_the_frames_that_were_counted_for_them(shared_data: Path) -> None:
    """The UT videos are DivX with packed frames: their containers claim up to three frames that do not exist."""
    lines = (shared_data / "ut_interaction" / "clips.csv").read_text().splitlines()
    columns = lines[0].split(",")
    for line in lines[1:60:12]:
        row = dict(zip(columns, line.split(","), strict=True))
        clip = decode_clip(shared_data / "ut_interaction" / row["path"], 25, 256)
        assert clip.num_source_frames == int(row["frames"])
        assert (clip.width, clip.height) == (int(row["width"]), int(row["height"]))
        assert list(clip.frame_indices) == uniform_frame_indices(int(row["frames"]), 25)


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [("avi", "mpeg4", {"bf": "2"}), ("mp4", "h264", {"bf": "3", "g": "12"}), ("mkv", "h264", {"bf": "0"})],
)
def test_windows_have_the_frames_of_their_seconds(
    suffix: str, codec: str, options: dict[str, str], tmp_path: Path, numbered
) -> None:
    path = numbered.write(tmp_path / f"v.{suffix}", 61, codec=codec, options=options)  # 2.44 s
    windows = list(decode_windows(path, 5, None, 1, 0.5))
    assert [(round(each.start, 2), round(each.end, 2)) for each in windows] == [
        (0, 1), (0.5, 1.5), (1, 2), (1.44, 2.44)
    ]  # fmt: skip
    frames = [[numbered.read(frame_HWC) for frame_HWC in each.frames_THWC] for each in windows]
    assert frames[0] == [0, 5, 10, 15, 20]
    assert frames[1] == [12, 17, 22, 27, 32]
    assert frames[2] == [25, 30, 35, 40, 45]
    assert frames[3] == [36, 41, 46, 51, 56]


def test_windows_of_a_varying_frame_rate_follow_the_seconds(tmp_path: Path, numbered) -> None:
    times = [0, 1, 2, 3, 4, 5, 50, 51, 90, 100]
    path = numbered.write(tmp_path / "v.mkv", 10, codec="h264", options={"bf": "0"}, times=times)
    (first, *_) = decode_windows(path, 4, None, 1, 1)  # in hundredths of a second
    assert [numbered.read(frame_HWC) for frame_HWC in first.frames_THWC] == [0, 5, 6, 7]


def test_a_video_shorter_than_a_window_is_the_clip_it_was_packed_as(tmp_path: Path, numbered) -> None:
    path = numbered.write(tmp_path / "v.mp4", 11, codec="h264", options={})
    (window,) = decode_windows(path, 25, None, 4, 2)
    assert (window.frames_THWC == decode_clip(path, 25, None).frames_THWC).all()
    assert (window.start, round(window.end, 2)) == (0, 0.44)


@pytest.mark.parametrize(("seconds", "stride"), [(0, 1), (1, 0), (-1, 1)])
def test_windows_without_length_are_refused(seconds: int, stride: int) -> None:
    with pytest.raises(ValueError, match="both must be above 0"):
        window_starts(10, seconds, stride)
