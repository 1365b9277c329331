"""Preparing a published data set: unpacked, counted, continued, and refused when it is another one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shards.datasets import scan
from shards.published_sets import PUBLISHED, PublishedSet, prepare_splits, prepare_videos
from tests.shards.test_archives import zipped

ACTIONS = ("hug", "run", "wave")
SMALL = replace(
    PUBLISHED["hmdb51"], num_actions=3, num_listed=6, num_videos=6, parts=((3, 3), (3, 3), (3, 3))
)  # HMDB51 in small: an archive of archives


def video_archive(path: Path, actions: Sequence[str] = ACTIONS) -> Path:
    inner = {f"{action}.rar": zipped({f"{action}/{n}.avi": b"video" for n in range(2)}) for action in actions}
    path.write_bytes(zipped(inner))
    return path


def split_archive(path: Path, videos_of_an_action: int = 2) -> Path:
    files = {
        f"test_splits/{action}_test_split{k}.txt": "".join(
            f"{n}.avi {1 + n % 2} \n" for n in range(videos_of_an_action)
        ).encode()
        for action in ACTIONS
        for k in (1, 2, 3)
    }
    path.write_bytes(zipped(files | {"__MACOSX/._x.txt": b"junk"}))
    return path


def silent(done: int, note: str) -> None:
    del done, note


def test_archive_of_archives_becomes_a_set_that_can_be_packed(tmp_path: Path) -> None:
    steps: list[tuple[int, str]] = []
    archive = video_archive(tmp_path / "hmdb51_org.rar")
    videos, count = prepare_videos(SMALL, archive, tmp_path / "out", lambda done, note: steps.append((done, note)))
    assert (count, steps[-1][0], [note for _, note in steps[:-1]]) == (6, 3, list(ACTIONS))
    splits = prepare_splits(SMALL, split_archive(tmp_path / "splits.zip"), tmp_path / "out", videos)
    found = scan("small", videos, "hmdb51", splits)
    assert (found.actions, len(found.videos), found.num_unlisted) == (ACTIONS, 6, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["splits", "videos"]


def test_flat_archive_of_folders_works_as_well(tmp_path: Path) -> None:
    archive = tmp_path / "UCF101.rar"
    archive.write_bytes(zipped({f"UCF-101/{action}/{n}.avi": b"video" for action in ACTIONS for n in range(2)}))
    assert prepare_videos(SMALL, archive, tmp_path / "out", silent)[1] == 6


def test_interrupted_preparation_keeps_the_actions_that_are_there(tmp_path: Path) -> None:
    archive = video_archive(tmp_path / "a.rar")

    def interrupted(done: int, note: str) -> None:
        if note == "run":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_videos(SMALL, archive, tmp_path / "out", interrupted)
    before = (tmp_path / "out" / "videos" / "hug").stat().st_ino
    assert prepare_videos(SMALL, archive, tmp_path / "out", silent)[1] == 6
    assert (tmp_path / "out" / "videos" / "hug").stat().st_ino == before
    archive.unlink()
    assert prepare_videos(SMALL, archive, tmp_path / "out", silent)[1] == 6, "done already: the archive is not needed"


def test_archive_of_too_few_videos_is_refused_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds 4 videos of 2 actions, and hmdb51 has 6 of 3.*fetch it again"):
        prepare_videos(SMALL, video_archive(tmp_path / "a.rar", ACTIONS[:2]), tmp_path / "out", silent)


@pytest.mark.parametrize(
    ("published", "per_action", "message"),
    [
        (replace(SMALL, parts=((4, 2), *SMALL.parts[1:])), 2, r"split 1 of .* has 3 training and 3 test"),
        (replace(SMALL, parts=((6, 3),) * 3), 3, r"3 of 9 videos .* are not in .*first: hug/2\.avi"),
    ],
)
def test_split_files_of_another_set_are_refused(
    tmp_path: Path, published: PublishedSet, per_action: int, message: str
) -> None:
    videos, _ = prepare_videos(SMALL, video_archive(tmp_path / "a.rar"), tmp_path / "out", silent)
    with pytest.raises(ValueError, match=message):
        prepare_splits(published, split_archive(tmp_path / "s.zip", per_action), tmp_path / "out", videos)


@pytest.mark.parametrize("name", ["hmdb51", "ucf101"])
def test_published_numbers_are_those_of_the_official_split_files(shared_data: Path, name: str) -> None:
    from shards.split_files import read_hmdb51, read_ucf101

    folder = shared_data / "splits" / name
    nested = next((path for path in folder.iterdir() if path.is_dir()), folder)
    listing = (read_hmdb51 if name == "hmdb51" else read_ucf101)(nested)
    published = PUBLISHED[name]
    assert (len(listing.actions), len(listing.videos)) == (published.num_actions, published.num_listed)
    for split, expected in enumerate(published.parts):
        parts = [video.splits[split] for video in listing.videos]
        assert (parts.count("train"), parts.count("test")) == expected
