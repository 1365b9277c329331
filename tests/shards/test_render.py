"""Rendered video files: complete, playable, the same for a seed, kept when rendered again."""

import csv
import io
import shutil
from pathlib import Path

import av
import numpy as np
import pytest

from shards import render
from shards.contact_sheet import contact_sheet
from shards.datasets import scan
from shards.render import encode_video, main, render_videos
from shards.scenes import MOTION_PAIR, PAIRS, render_clip

SIZE = (48, 36)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of each action. Not to be written to."""
    directory = tmp_path_factory.mktemp("rendered") / "videos"
    render_videos(directory, 3, 0, SIZE)
    return directory


@pytest.fixture
def copy_of_rendered(rendered: Path, tmp_path: Path) -> Path:
    """The same videos once more, to go on from."""
    return Path(shutil.copytree(rendered, tmp_path / "copy"))


@pytest.mark.slow
def test_table_lists_every_video_and_tests_each_once(rendered: Path) -> None:
    with (rendered / "videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["path"] for row in rows) == sorted(name for name in contents(rendered) if name.endswith(".mp4"))
    assert {row["action"] for row in rows} == {action for pair in PAIRS for action in pair}
    for row in rows:
        assert Path(row["path"]).parent.name == row["action"]
        assert sorted(row[f"split{split}"] for split in (1, 2, 3)) == ["test", "train", "train"]
    for split in ("split1", "split2", "split3"):
        parts = [{row["group"] for row in rows if row[split] == part} for part in ("train", "test")]
        assert not parts[0] & parts[1], "a group is never split"
        for pair in PAIRS:
            counts = [sum(row["action"] == action and row[split] == "test" for row in rows) for action in pair]
            assert counts[0] == counts[1] >= 1


def test_table_and_folders_are_read_as_a_data_set(rendered: Path) -> None:
    table = scan("shapes", rendered, "table", rendered / "videos.csv")
    folders = scan("shapes", rendered, "folders")
    assert len(table.videos) == len(folders.videos) == 24
    assert set(table.actions) == set(folders.actions) == {action for pair in PAIRS for action in pair}


def test_videos_are_h264_of_the_size_with_every_frame(rendered: Path) -> None:
    for path in rendered.rglob("*.mp4"):
        with av.open(path) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert (stream.width, stream.height) == SIZE
            assert stream.average_rate in render.FRAME_RATES
            assert sum(1 for _ in container.decode(stream)) == stream.frames >= 30


def test_encoded_frames_come_back_nearly_as_they_were() -> None:
    frames_THWC = render_clip("grow", [0])
    with av.open(io.BytesIO(encode_video(frames_THWC, 20))) as container:
        decoded_THWC = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded_THWC.shape == frames_THWC.shape
    assert np.abs(decoded_THWC.astype(int) - frames_THWC).mean() < 6


@pytest.mark.slow
def test_stopped_render_goes_on_to_the_same_bytes_and_keeps_whole_files(rendered: Path, tmp_path: Path) -> None:
    def stop_after_seven(done: int, _total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        render_videos(stopped, 3, 0, SIZE, stop_after_seven)
    assert not (stopped / "videos.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*.mp4")}
    assert len(before) == 7
    (stopped / ".rendered.json.1.part").write_bytes(b"left by a killed process")
    render_videos(stopped, 3, 0, SIZE)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (stopped / ".rendered.json.1.part").unlink()
    assert contents(stopped) == contents(rendered)


def test_motion_pair_is_added_to_what_is_there(rendered: Path, copy_of_rendered: Path) -> None:
    render_videos(copy_of_rendered, 3, 0, SIZE, with_motion_pair=True)
    few, more = contents(rendered), contents(copy_of_rendered)
    assert b"move_right" in more.pop("videos.csv")
    assert {name for name in more if name not in few} == {
        f"{action}/{action}_{number:03d}.mp4" for action in MOTION_PAIR for number in range(3)
    }


def test_progress_counts_kept_videos_too(copy_of_rendered: Path) -> None:
    calls: list[tuple[int, int]] = []
    render_videos(copy_of_rendered, 3, 0, SIZE, lambda done, total: calls.append((done, total)))
    assert calls == [(done, 24) for done in range(1, 25)]


def test_folder_of_other_options_or_other_files_is_left_alone(rendered: Path, tmp_path: Path) -> None:
    before = contents(rendered)
    with pytest.raises(ValueError, match=r"seed 0.*not with.*seed 1.*choose another folder"):
        render_videos(rendered, 3, 1, SIZE)
    assert contents(rendered) == before
    (tmp_path / "holiday.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match="choose an empty folder"):
        render_videos(tmp_path, 3, 0, SIZE)
    assert contents(tmp_path) == {"holiday.mp4": b"x"}


@pytest.mark.parametrize(
    ("clips", "seed", "size", "words"),
    [(2, 0, SIZE, "3 or more"), (3, -1, SIZE, "0 or more"), (3, 0, (47, 36), "even"), (3, 0, (16, 16), "32")],
)
def test_what_cannot_be_rendered_is_refused_before_anything_is_written(
    tmp_path: Path, clips: int, seed: int, size: tuple[int, int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        render_videos(tmp_path / "new", clips, seed, size)
    assert not (tmp_path / "new").exists()


def test_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "videos"), "--clips-per-action", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_contact_sheet_is_a_small_picture() -> None:
    picture = contact_sheet(0)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 300_000
