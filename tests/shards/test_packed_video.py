"""Format video: the files themselves in the shards, with the same frames, order and promises as format frames."""

import io
import json
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from shards.clip_bytes import read_tar_members, tar_members
from shards.datasets import VideoSet, scan
from shards.index import Index
from shards.packed_video import video_files
from shards.plan import PackOptions, plan_packing
from shards.read import ClipLoader, LoaderOptions, decode_frames
from shards.store import Store, open_store
from shards.verify import verify
from shards.video import decode_clip
from tavlad.clip import BadClip, ClipBatch

OPTIONS = PackOptions(format="video", num_frames=4, short_side=32)
READING = LoaderOptions(batch_size=5, seed=3, crop=24, augment=True, shuffle=True)


@pytest.fixture(scope="module")
def video_set(videos: VideoSet, tmp_path_factory: pytest.TempPathFactory, numbered) -> tuple[Index, Store]:
    """The 18 videos of the other fixtures, packed as they are."""
    store = open_store(str(tmp_path_factory.mktemp("video_set")))
    return numbered.pack(plan_packing(videos, OPTIONS), store), store


def members_of(index: Index, store: Store) -> dict[str, bytes]:
    rows = index.clips_table.table.to_pylist()
    return {row["source"]: store.read_range(row["shard"], row["offset"], row["length"]) for row in rows}


def test_shards_hold_the_original_files_for_tar_and_webdataset(
    videos: VideoSet, video_set: tuple[Index, Store]
) -> None:
    index, store = video_set
    originals = {row["key"]: row["source"] for row in index.clips_table.table.to_pylist()}
    paths = {video.name: video.path for video in videos.videos}
    by_tar: dict[str, bytes] = {}
    by_webdataset: dict[str, bytes] = {}
    for shard in store.list("shards/"):
        with tarfile.open(fileobj=io.BytesIO(store.read(shard))) as tar:
            by_tar |= {member.name: tar.extractfile(member).read() for member in tar if member.name.endswith(".avi")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # it does not close its files
            for sample in webdataset.WebDataset(str(Path(store.uri, shard)), shardshuffle=False):
                by_webdataset[f"{sample['__key__']}.avi"] = sample["avi"]
    assert by_tar == by_webdataset == {f"{key}.avi": paths[name].read_bytes() for key, name in originals.items()}
    assert verify(store) == []


def test_both_formats_give_the_same_batches_and_the_same_frames(
    packed, video_set: tuple[Index, Store], numbered
) -> None:
    index, store = video_set
    assert index.num_frames == packed.index.num_frames
    same = ["key", "label", "split1", "group", "num_source_frames", "width", "height", "source_fps"]
    described = [each.clips_table.table.select(same).sort_by("key") for each in (index, packed.index)]
    assert described[0].equals(described[1])

    def batches(of: Index, at: Store, rank: int, **changes: object) -> list[ClipBatch]:
        loader = ClipLoader(of, at, 1, "train", replace(READING, **changes), rank, 2)
        return [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]

    for rank in (0, 1):
        of_videos, of_frames = (batches(*each, rank) for each in ((index, store), (packed.index, packed.store)))
        assert [batch.keys for batch in of_videos] == [batch.keys for batch in of_frames]
        for one, other in zip(of_videos, of_frames, strict=True):
            assert torch.equal(one.labels_B, other.labels_B)
            difference = (one.frames_BTCHW.float() - other.frames_BTCHW.float()).square().mean()
            assert len(one.keys) == 0 or difference < 65, "but for the JPEGs' loss, PSNR above 30 dB"
    for source, members in members_of(index, store).items():
        shown = [numbered.read(frame_CHW.permute(1, 2, 0).numpy()) for frame_CHW in decode_frames(members)]
        packed_ones = members_of(packed.index, packed.store)[source]
        assert shown == [numbered.read(f_CHW.permute(1, 2, 0).numpy()) for f_CHW in decode_frames(packed_ones)]


def test_reading_decodes_what_packing_would_have_chosen_to_the_bit(tmp_path: Path, numbered, shared_data: Path) -> None:
    source = shared_data / "sample_clips"
    rows = [f"{path.relative_to(source).as_posix()},any,train" for path in sorted(source.glob("*/*.*"))]
    (tmp_path / "t.csv").write_text("\n".join(["path,action,split", *rows]))
    options = PackOptions(format="video", num_frames=7, short_side=112)
    store = open_store(str(tmp_path / "set"))
    index = numbered.pack(plan_packing(scan("s", source, "table", tmp_path / "t.csv"), options), store)
    assert len(index.clips_table) == 6
    for name, members in members_of(index, store).items():
        expected_THWC = decode_clip(source / name, 7, 112).frames_THWC
        read_TCHW = decode_frames(members)
        assert np.array_equal(read_TCHW.numpy().transpose(0, 2, 3, 1), expected_THWC), name
        assert read_TCHW.movedim(1, -1).is_contiguous(), "channels last in memory, as JPEGs are"


def test_any_suffix_is_found_again_and_none_is_taken_for_the_facts(tmp_path: Path, numbered) -> None:
    folder = tmp_path / "v"
    for name in ("a.MP4", "b.json", "c", "d.e f", "g.mkv"):
        made = numbered.write(tmp_path / ("v.mkv" if name == "g.mkv" else "v.mp4"), 6, codec="h264")
        folder.mkdir(exist_ok=True)
        made.rename(folder / name)
    table = "path,action,split\n" + "".join(f"{name},x,train\n" for name in ("a.MP4", "b.json", "c", "d.e f", "g.mkv"))
    (tmp_path / "t.csv").write_text(table)
    plan = plan_packing(scan("s", folder, "table", tmp_path / "t.csv"), OPTIONS)
    store = open_store(str(tmp_path / "set"))
    index = numbered.pack(plan, store)
    names: dict[str, str] = {}
    for name, members in members_of(index, store).items():
        with tarfile.open(fileobj=io.BytesIO(members + bytes(1024))) as tar:
            names[name] = tar.getnames()[1].partition(".")[2]
        assert [numbered.read(f_CHW.permute(1, 2, 0).numpy()) for f_CHW in decode_frames(members)] == [0, 1, 3, 4]
    assert names == {"a.MP4": "mp4", "b.json": "video", "c": "video", "d.e f": "video", "g.mkv": "mkv"}


def test_bad_and_huge_videos_are_rejected_when_packed(
    tmp_path: Path, numbered, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = numbered.folders(tmp_path / "v", videos_per_action=1)
    whole = (folder / "wave" / "clip 0.avi").read_bytes()
    (folder / "wave" / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (folder / "wave" / "gone.avi").symlink_to(tmp_path / "nowhere")
    (folder / "wave" / "huge.avi").write_bytes(whole + bytes(100_000))
    monkeypatch.setattr("shards.clip_packing._MAX_VIDEO_BYTES", 100_000)
    store = open_store(str(tmp_path / "set"))
    plan = plan_packing(scan("s", folder, "folders"), OPTIONS)
    assert len(numbered.pack(plan, store).clips_table) == 3
    from shards.index import REJECTED_PATH, read_table

    rejected = {row["path"]: row["reason"] for row in read_table(store, REJECTED_PATH)[0].to_pylist()}
    assert sorted(rejected) == ["wave/cut.avi", "wave/gone.avi", "wave/huge.avi"]
    assert "truncated" in rejected["wave/cut.avi"]
    assert rejected["wave/gone.avi"] == "does not exist"
    assert "too much for one clip: cut it, or pack with --format frames" in rejected["wave/huge.avi"]


def test_number_of_shards_follows_from_the_sizes_of_the_files(videos: VideoSet) -> None:
    total = sum(video.path.stat().st_size for video in videos.videos)
    options = replace(OPTIONS, shard_megabytes=total / 6.5 / 1e6)
    assert len(plan_packing(videos, options).shards) == 7


def test_video_that_this_machine_cannot_decode_stops_the_run_with_its_key(video_set: tuple[Index, Store]) -> None:
    facts = bytes(read_tar_members(next(iter(members_of(*video_set).values())))[0])
    key = json.loads(facts)["key"]
    with pytest.raises(BadClip, match=f"clip {key} cannot be read as a video.*use the same version of PyAV everywhere"):
        decode_frames(tar_members(key, {"json": facts, "avi": b"no video"}))


def test_facts_say_what_reading_needs() -> None:
    files = video_files("x/A b.AVI", {"key": "k", "frame_indices": [0, 3]}, 128, b"film")
    assert list(files) == ["json", "avi"]
    assert json.loads(files["json"])["video"] == {"suffix": ".avi", "short_side": 128}
