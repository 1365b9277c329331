"""What is on the disk and what the split files say come together, or an error says where they do not."""

from collections import Counter
from pathlib import Path

import pytest

from shards.datasets import scan


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def hmdb51(root: Path, **splits: str) -> Path:
    root.mkdir(exist_ok=True)
    for action, text in splits.items():
        (root / f"{action}_test_split1.txt").write_text(text)
    return root


def test_videos_that_no_split_file_names_are_left_out_and_counted(tmp_path: Path) -> None:
    videos = touch(tmp_path / "v", "wave/a.avi", "wave/b.avi", "wave/c.avi", "clap/d.avi", "wave/notes.txt", ".x/e.avi")
    found = scan("set", videos, "hmdb51", hmdb51(tmp_path / "s", wave="a.avi 1\nb.avi 2\n"))
    assert [(video.name, video.path, video.splits[0]) for video in found.videos] == [
        ("wave/a.avi", videos / "wave/a.avi", "train"),
        ("wave/b.avi", videos / "wave/b.avi", "test"),
    ]
    assert found.actions == ("wave",)
    assert found.num_unlisted == 2


def test_absent_video_is_told_by_file_line_and_remedy(tmp_path: Path) -> None:
    videos = touch(tmp_path / "v", "wave/a.avi")
    with pytest.raises(ValueError, match=r"wave_test_split1\.txt:2: .*wave/b\.avi does not exist; put it there, or"):
        scan("set", videos, "hmdb51", hmdb51(tmp_path / "s", wave="a.avi 1\nb.avi 2\n"))


def test_action_without_training_video_is_an_error(tmp_path: Path) -> None:
    videos = touch(tmp_path / "v", "wave/a.avi", "clap/b.avi")
    with pytest.raises(ValueError, match=r"clap_test_split1\.txt:1: action 'clap' has no training video in split 1;"):
        scan("set", videos, "hmdb51", hmdb51(tmp_path / "s", wave="a.avi 1\n", clap="b.avi 2\n"))


def test_folder_per_action_is_split_seventy_to_thirty(tmp_path: Path) -> None:
    names = [f"{action}/{number}.mp4" for action in ("wave", "clap") for number in range(10)]
    found = scan("set", touch(tmp_path, *names), "folders")
    assert found.actions == ("clap", "wave")
    for split in range(3):
        counts = Counter((video.action, video.splits[split]) for video in found.videos)
        assert counts == {(a, part): n for a in found.actions for part, n in (("train", 7), ("test", 3))}
    tested = [[video.name for video in found.videos if video.splits[split] == "test"] for split in range(3)]
    assert len({name for names in tested for name in names}) == 18, "three splits test different videos"
    assert len({video.group for video in found.videos}) == 20


def test_folder_splits_depend_on_seed_and_names_alone(tmp_path: Path) -> None:
    names = [f"wave/{number}.mp4" for number in range(10)]
    here, there = touch(tmp_path / "here", *names), touch(tmp_path / "there", *reversed(names))

    def splits(folder: Path, seed: int) -> list[tuple[str, ...]]:
        return [video.splits for video in scan("set", folder, "folders", seed=seed).videos]

    assert splits(here, 0) == splits(there, 0)
    assert splits(here, 0) != splits(here, 1)


@pytest.mark.parametrize("count", range(1, 8))
def test_every_action_has_a_training_and_if_it_can_a_test_video(count: int, tmp_path: Path) -> None:
    found = scan("set", touch(tmp_path, *(f"wave/{number}.avi" for number in range(count))), "folders")
    for split in range(3):
        parts = Counter(video.splits[split] for video in found.videos)
        assert parts["train"] >= 1
        assert parts["test"] >= (count > 1)


def test_videos_in_folders_of_folders_belong_to_the_action_above(tmp_path: Path) -> None:
    found = scan("set", touch(tmp_path, "wave/day 1/a.AVI", "wave/day 2/a.AVI", "loose.avi"), "folders")
    assert [(video.name, video.action) for video in found.videos] == [
        ("wave/day 1/a.AVI", "wave"),
        ("wave/day 2/a.AVI", "wave"),
    ]
    assert found.num_unlisted == 1


def test_table_takes_files_of_any_name(tmp_path: Path) -> None:
    videos = touch(tmp_path / "v", "a.bin", "ходьба 1.mp4")
    table = tmp_path / "t.csv"
    table.write_text("path,action,split\na.bin,wave,train\nходьба 1.mp4,wave,test\n", encoding="utf-8")
    found = scan("set", videos, "table", table)
    assert [video.path.is_file() for video in found.videos] == [True, True]
    assert found.num_unlisted == 0


@pytest.mark.parametrize(
    ("layout", "splits", "message"),
    [
        ("hmdb51", None, "hmdb51 needs its split files"),
        ("folders", "s", "a folder per action has no split files"),
    ],
)
def test_split_files_are_asked_for_where_they_belong(
    layout: str, splits: str | None, message: str, tmp_path: Path
) -> None:
    touch(tmp_path, "wave/a.avi")
    with pytest.raises(ValueError, match=message):
        scan("set", tmp_path, layout, tmp_path / splits if splits else None)


def test_folder_without_videos_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent is no folder"):
        scan("set", tmp_path / "absent", "folders")
    with pytest.raises(ValueError, match="holds no folder with videos"):
        scan("set", tmp_path, "folders")
    touch(tmp_path, "wave/a.avi", "empty/notes.txt")
    with pytest.raises(ValueError, match=r"empty holds no video; put some in it, or remove it"):
        scan("set", tmp_path, "folders")


def test_real_sets_scan_whole(shared_data: Path) -> None:
    weizmann = scan("w", shared_data / "weizmann" / "videos", "ucf101", shared_data / "weizmann" / "splits_ucf_format")
    assert (len(weizmann.videos), len(weizmann.actions), weizmann.num_unlisted) == (90, 10, 0)
    ut = scan("ut", shared_data / "ut_interaction" / "videos", "folders")
    assert (len(ut.videos), len(ut.actions)) == (60, 6)
