"""The published split files parse to the published counts; what is wrong in a file is told by file and line."""

from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.split_files import Listing, read_hmdb51, read_table_of_videos, read_ucf101
from tavlad.errors import UserError


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return folder


UCF101 = {
    "classInd.txt": "1 Clap\r\n2 Wave\r\n",
    "trainlist01.txt": "Clap/v_Clap_g01_c01.avi 1\r\nWave/v_Wave_g01_c01.avi 2\r\n",
    "testlist01.txt": "Clap/v_Clap_g02_c01.avi\r\nWave/v_Wave_g02_c01.avi\r\n",
}


@pytest.fixture(scope="module")
def hmdb51(shared_data: Path) -> Listing:
    return read_hmdb51(shared_data / "splits" / "hmdb51" / "testTrainMulti_7030_splits")


@pytest.fixture(scope="module")
def ucf101(shared_data: Path) -> Listing:
    return read_ucf101(shared_data / "splits" / "ucf101")


def counts(listing: Listing) -> list[tuple[int, int]]:
    return [(listing.count(split, "train"), listing.count(split, "test")) for split in (1, 2, 3)]


def test_official_hmdb51_files_have_the_published_counts(hmdb51: Listing) -> None:
    assert len(hmdb51.videos) == 6766
    assert len(hmdb51.actions) == 51
    assert counts(hmdb51) == [(3570, 1530)] * 3
    for split in range(3):
        per_action = Counter((video.action, video.splits[split]) for video in hmdb51.videos)
        assert all(per_action[action, "train"] == 70 and per_action[action, "test"] == 30 for action in hmdb51.actions)


def test_official_ucf101_files_have_the_published_counts(ucf101: Listing) -> None:
    assert len(ucf101.videos) == 13320
    assert len(ucf101.actions) == 101
    assert (ucf101.actions[0], ucf101.actions[100]) == ("ApplyEyeMakeup", "YoYo")
    assert counts(ucf101) == [(9537, 3783), (9586, 3734), (9624, 3696)]


def test_groups_of_ucf101_are_25_an_action_and_never_on_both_sides(ucf101: Listing) -> None:
    groups = defaultdict(set)
    for video in ucf101.videos:
        groups[video.action].add(video.group)
    assert all(len(names) == 25 for names in groups.values())
    assert sum(len(names) for names in groups.values()) == len({video.group for video in ucf101.videos})
    for split in range(3):
        parts = defaultdict(set)
        for video in ucf101.videos:
            parts[video.group].add(video.splits[split])
        assert all(len(found) == 1 for found in parts.values())


def test_source_videos_of_hmdb51_are_never_on_both_sides_of_an_action(hmdb51: Listing) -> None:
    """What its publishers promise. The same film may give one action's training and another action's test clips."""
    for split in range(3):
        sides = defaultdict(set)
        for video in hmdb51.videos:
            if video.splits[split] != "unused":
                sides[video.action, video.group].add(video.splits[split])
        assert len(sides) > 1900
        assert all(len(found) == 1 for found in sides.values())
    assert len({video.group for video in hmdb51.videos}) == 1407, "as many source videos as the names tell apart"


def test_group_of_hmdb51_is_the_source_video(hmdb51: Listing) -> None:
    groups = {video.name: video.group for video in hmdb51.videos}
    assert groups["wave/50_FIRST_DATES_wave_u_cm_np1_fr_med_36.avi"] == "50_FIRST_DATES"
    assert groups["wave/21_wave_u_nm_np1_fr_goo_5.avi"] == "21"
    assert groups["shoot_bow/Return_of_the_King_7_shoot_bow_u_nm_np10_ba_med_2.avi"] == "Return_of_the_King_7"
    assert not any("_np" in group for group in groups.values()), "every name follows the scheme"


def test_weizmann_reads_the_same_from_both_formats(shared_data: Path) -> None:
    hmdb51 = read_hmdb51(shared_data / "weizmann" / "splits_hmdb_format")
    ucf101 = read_ucf101(shared_data / "weizmann" / "splits_ucf_format")
    assert hmdb51.actions == ucf101.actions
    assert [(video.name, video.splits) for video in hmdb51.videos] == [(v.name, v.splits) for v in ucf101.videos]
    assert counts(hmdb51) == [(60, 30)] * 3


def test_hmdb51_codes_are_unused_train_and_test(tmp_path: Path) -> None:
    text = "a b_wave_f_cm_np1_ba_med_0.avi 1 \nc.avi 2 \n\nd.avi 0 \n"
    listing = read_hmdb51(write(tmp_path, {"wave_test_split2.txt": text, "notes.txt": "no split file"}))
    assert [(video.name, video.splits, video.group) for video in listing.videos] == [
        ("wave/a b_wave_f_cm_np1_ba_med_0.avi", ("unused", "train", "unused"), "a b"),
        ("wave/c.avi", ("unused", "test", "unused"), "c"),
        ("wave/d.avi", ("unused", "unused", "unused"), "d"),
    ]


def test_ucf101_takes_carriage_returns_and_one_split(tmp_path: Path) -> None:
    listing = read_ucf101(write(tmp_path, UCF101))
    assert [(video.name, video.splits[0], video.group) for video in listing.videos] == [
        ("Clap/v_Clap_g01_c01.avi", "train", "Clap_g01"),
        ("Clap/v_Clap_g02_c01.avi", "test", "Clap_g02"),
        ("Wave/v_Wave_g01_c01.avi", "train", "Wave_g01"),
        ("Wave/v_Wave_g02_c01.avi", "test", "Wave_g02"),
    ]
    assert counts(listing)[1:] == [(0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("trainlist01.txt", "Clap/a.avi 1\nSwim/b.avi 2\n", r"trainlist01\.txt:2: 'Swim' is no action of classInd"),
        ("trainlist01.txt", "Clap/a.avi 2\n", r"trainlist01\.txt:1: 'Clap' has label 2, but 1 in classInd"),
        ("trainlist01.txt", "Clap/a.avi\n", r"trainlist01\.txt:1: 'Clap' has label none"),
        (
            "trainlist01.txt",
            "Clap/a.avi 1\n\nClap/a.avi 1\n",
            r"trainlist01\.txt:3: Clap/a\.avi is already in split 1",
        ),
        (
            "testlist01.txt",
            "Clap/v_Clap_g01_c01.avi\n",
            r"testlist01\.txt:1: .* already in split 1 \(.*trainlist01",
        ),
        ("testlist01.txt", "/etc/a.avi\n", r"testlist01\.txt:1: '' is no action"),
        ("testlist01.txt", "Clap/../../a.avi\n", r"testlist01\.txt:1: .* leaves the videos folder"),
        ("classInd.txt", "1 Clap\n1 Wave\n", r"classInd\.txt:2: expected 'LABEL ACTION'"),
        ("classInd.txt", "Clap 1\n", r"classInd\.txt:1: expected 'LABEL ACTION'"),
    ],
)
def test_wrong_line_of_ucf101_is_named(file: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_ucf101(write(tmp_path, UCF101 | {file: text}))


def test_label_order_of_ucf101_is_by_its_numbers(tmp_path: Path) -> None:
    classes = "10 Clap\n9 Wave\n"
    lists = {name: text.replace(" 1\r", " 10\r").replace(" 2\r", " 9\r") for name, text in UCF101.items()}
    assert read_ucf101(write(tmp_path, lists | {"classInd.txt": classes})).actions == ("Wave", "Clap")


@pytest.mark.parametrize("absent", ["classInd.txt", "testlist01.txt"])
def test_ucf101_folder_that_is_not_whole_names_the_missing_file(absent: str, tmp_path: Path) -> None:
    files = {name: text for name, text in UCF101.items() if name != absent}
    with pytest.raises(ValueError, match=f"has no {absent}: give the folder"):
        read_ucf101(write(tmp_path, files))


@pytest.mark.parametrize("line", ["a.avi 3", "a.avi", "1", "a.avi x"])
def test_wrong_line_of_hmdb51_is_named(line: str, tmp_path: Path) -> None:
    folder = write(tmp_path, {"wave_test_split1.txt": f"b.avi 1\n{line}\n"})
    with pytest.raises(ValueError, match=r"wave_test_split1\.txt:2: expected 'NAME\.avi ID'"):
        read_hmdb51(folder)


def test_folder_above_hmdb51s_files_is_told_where_they_are(tmp_path: Path) -> None:
    write(tmp_path / "testTrainMulti_7030_splits", {"wave_test_split1.txt": "a.avi 1\n"})
    with pytest.raises(ValueError, match=r"they are in .*testTrainMulti_7030_splits"):
        read_hmdb51(tmp_path)
    with pytest.raises(ValueError, match="absent is no folder"):
        read_hmdb51(tmp_path / "absent")


TABLE = "path,action,split1,split3,group\nx/a 1.mp4,wave,train,test,night\nx/b.mp4,clap,test,train,\n"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_give_paths_actions_splits_and_groups(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"t.csv": TABLE}) / "t.csv"
    if kind == "parquet":
        rows = [line.split(",") for line in TABLE.splitlines()]
        path = tmp_path / "t.parquet"
        pq.write_table(pa.Table.from_pylist([dict(zip(rows[0], row, strict=True)) for row in rows[1:]]), path)
    listing = read_table_of_videos(path)
    assert listing.actions == ("clap", "wave")
    assert [(video.name, video.action, video.splits, video.group) for video in listing.videos] == [
        ("x/a 1.mp4", "wave", ("train", "unused", "test"), "night"),
        ("x/b.mp4", "clap", ("test", "unused", "train"), "x/b"),
    ]


def test_column_split_is_split_1(tmp_path: Path) -> None:
    path = write(tmp_path, {"t.csv": "path,action,split\na.mp4,wave,train\n"}) / "t.csv"
    assert read_table_of_videos(path).videos[0].splits == ("train", "unused", "unused")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label,split\na,b,train\n", r"t\.csv has no column 'action' \(it has path, label, split\)"),
        ("path,action\na,b\n", r"t\.csv has no column 'split1'"),
        ("path,action,split\na,b,train\na2,b,tset\n", r"t\.csv:3: split is 'tset'; write train, test or unused"),
        ("path,action,split\na,,train\n", r"t\.csv:2: path or action is empty"),
        ("path,action,split\na,b,train\na,c,test\n", r"t\.csv:3: a is already in split 1 \(.*t\.csv:2\)"),
        ("path,action,split\n../a,b,train\n", r"t\.csv:2: '\.\./a' leaves the videos folder"),
        ("path,action,split\na,b\n", r"t\.csv:2: split is ''"),
        ("path,action,split,split2\na,b,train,test\n", r"t\.csv has a column 'split' and numbered ones: rename"),
        ("", r"t\.csv has no column 'path'"),
        (f"path,action,split\na,{'b' * 200_000},train\n", r"t\.csv:2 is no line of a CSV table \(field larger than"),
    ],
)
def test_wrong_table_is_told_by_file_and_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_table_of_videos(write(tmp_path, {"t.csv": text}) / "t.csv")


def test_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.csv does not exist"):
        read_table_of_videos(tmp_path / "absent.csv")
    write(tmp_path, {"t.parquet": "no Parquet"})
    with pytest.raises(ValueError, match=r"t\.parquet is not a Parquet file"):
        read_table_of_videos(tmp_path / "t.parquet")
