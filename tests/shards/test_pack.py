"""Contract 1: what a packed set is, and that it comes out the same however packing went."""

import gc
import io
import json
import pickle
import subprocess
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from shards.clip_bytes import END_OF_SHARD, decode_jpeg, key_of, path_of, read_tar_members
from shards.datasets import VideoSet, scan
from shards.index import SCHEMA, load_index
from shards.pack import finish, finished_set, kept_shards, pack_shard
from shards.patience import outlast
from shards.plan import PackOptions, plan_packing
from shards.read import decode_frames
from shards.store import AccessRefused, Store, StoreUnreachable, open_store
from tavlad.clip import uniform_frame_indices
from tavlad.errors import UserError

SMALL = PackOptions(num_frames=2, short_side=16)


def read_by_webdataset(path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it does not close its files
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        gc.collect()
    return samples


def content(store: Store) -> dict[str, bytes]:
    return {path: store.read(path) for path in store.list()}


@pytest.fixture(scope="module")
def reference(videos: VideoSet, tmp_path_factory: pytest.TempPathFactory, numbered) -> dict[str, bytes]:
    """All objects of the set packed in a single go."""
    store = open_store(str(tmp_path_factory.mktemp("reference")))
    numbered.pack(plan_packing(videos, SMALL), store)
    return content(store)


def test_set_holds_shards_index_and_rejected_and_nothing_else(packed) -> None:
    assert packed.store.list() == ["index.parquet", "rejected.parquet", *(f"shards/00000{n}.tar" for n in range(3))]


def test_tarfile_webdataset_and_our_reader_get_the_same_jpegs(packed) -> None:
    rows = packed.index.clips_table.table.to_pylist()
    by_tarfile: dict[str, bytes] = {}
    by_webdataset: dict[str, bytes] = {}
    for shard in dict.fromkeys(row["shard"] for row in rows):
        with tarfile.open(fileobj=io.BytesIO(packed.store.read(shard))) as tar:
            by_tarfile |= {member.name: tar.extractfile(member).read() for member in tar}
        for sample in read_by_webdataset(Path(packed.store.uri, shard)):
            files = {name: data for name, data in sample.items() if isinstance(data, bytes)}
            by_webdataset |= {f"{sample['__key__']}.{name}": data for name, data in files.items()}
    by_us: dict[str, bytes] = {}
    for row in rows:
        members = packed.store.read_range(row["shard"], row["offset"], row["length"])
        names = ["json", *(f"{frame:02}.jpg" for frame in range(4))]
        contents = zip(names, read_tar_members(members), strict=True)
        by_us |= {f"{row['key']}.{name}": bytes(data) for name, data in contents}
    assert by_tarfile == by_webdataset == by_us
    assert len(by_us) == 18 * 5


def test_shards_are_plain_tars_to_tar(packed) -> None:
    for shard in range(3):
        path = Path(packed.store.uri, f"shards/{shard:06d}.tar")
        listed = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
        assert listed.stderr == ""
        assert len(listed.stdout.splitlines()) == 6 * 5


def test_packed_frame_i_shows_the_exact_source_frame(packed, numbered) -> None:
    for row in packed.index.clips_table.table.to_pylist():
        members = packed.store.read_range(row["shard"], row["offset"], row["length"])
        label, video = row["label"], int(row["source"].partition("clip ")[2][0])
        first, num_frames = 80 * label + 13 * video, 9 + video
        shown = [numbered.read(frame_CHW.permute(1, 2, 0).numpy()) for frame_CHW in decode_frames(members)]
        assert shown == [first + index for index in uniform_frame_indices(num_frames, 4)]
        assert row["num_source_frames"] == num_frames


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = ((one.astype(np.float32) - other) ** 2).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def test_packed_frame_is_pyavs_decoded_frame_and_not_its_neighbour(tmp_path: Path, numbered, shared_data: Path) -> None:
    """Every real sample against a decoding of its own: all frames by PyAV, then numpy's floor of linspace."""
    source = shared_data / "sample_clips"
    rows = [f"{path.relative_to(source).as_posix()},any,train" for path in sorted(source.glob("*/*.*"))]
    (tmp_path / "t.csv").write_text("\n".join(["path,action,split", *rows]))
    options = PackOptions(num_frames=25, short_side=4096, jpeg_quality=95)
    plan, store = plan_packing(scan("s", source, "table", tmp_path / "t.csv"), options), open_store(str(tmp_path / "s"))
    table = numbered.pack(plan, store).clips_table.table.to_pylist()
    assert len(table) == 6
    num_moved = 0
    for row in table:
        with av.open(str(source / row["source"]), metadata_errors="replace") as container:
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert row["num_source_frames"] == len(decoded)
        frames = decode_frames(store.read_range(row["shard"], row["offset"], row["length"]))
        chosen = np.floor(np.linspace(0, len(decoded), 25, endpoint=False)).astype(int)
        for packed_CHW, number in zip(frames.numpy(), chosen, strict=True):
            packed_HWC = packed_CHW.transpose(1, 2, 0)
            right = psnr(packed_HWC, decoded[number])
            assert right > 30, (row["source"], number)
            for neighbour in {max(0, number - 1), min(len(decoded) - 1, number + 1)} - {number}:
                if not np.array_equal(decoded[neighbour], decoded[number]):  # films repeat frames
                    num_moved += 1
                    assert psnr(packed_HWC, decoded[neighbour]) < right, (row["source"], number)
    assert num_moved > 150


def test_json_of_a_clip_says_what_it_is(packed) -> None:
    row = next(row for row in packed.index.clips_table.table.to_pylist() if row["source"] == "wave/clip 3.avi")
    facts = json.loads(bytes(read_tar_members(packed.store.read_range(row["shard"], row["offset"], row["length"]))[0]))
    assert facts["key"] == row["key"] == "wave%2Fclip%203%2Eavi"
    assert (facts["action"], facts["label"], facts["group"]) == ("wave", 2, "wave/clip 3")
    assert facts["splits"] == [row["split1"], row["split2"], row["split3"]]
    assert (facts["num_source_frames"], facts["frame_indices"]) == (12, [0, 3, 6, 9])
    assert (facts["frame_size"], facts["width"], facts["height"]) == ([43, 32], 64, 48)


def test_clips_are_dealt_to_shards_in_a_seeded_random_order(videos: VideoSet) -> None:
    def dealt(seed: int) -> list[list[str]]:
        plan = plan_packing(videos, replace(SMALL, seed=seed))
        return [[clip.video.name for clip in shard] for shard in plan.shards]

    assert dealt(0) == dealt(0)
    assert dealt(0) != dealt(1)
    assert sorted(name for shard in dealt(0) for name in shard) == [video.name for video in videos.videos]
    actions = [{name.partition("/")[0] for name in shard} for shard in dealt(0)]
    assert all(len(found) > 1 for found in actions), "a shard is a sample of all actions"


def test_shard_size_follows_from_the_estimate(videos: VideoSet) -> None:
    # 10 frames of 256 x 341 pixels at 0.3 bytes are 0.26 MB.
    options = PackOptions(num_frames=10, shard_megabytes=0.8)
    assert [len(shard) for shard in plan_packing(videos, options).shards] == [3] * 6
    assert len(plan_packing(videos, replace(options, shard_megabytes=0.2)).shards) == 18
    assert len(plan_packing(videos, replace(options, shard_megabytes=10_000.0)).shards) == 3


def test_packing_again_elsewhere_gives_the_same_bytes(
    videos: VideoSet, reference: dict[str, bytes], tmp_path: Path
) -> None:
    store = open_store(str(tmp_path))
    plan = pickle.loads(pickle.dumps(plan_packing(videos, SMALL)))
    results = [pickle.loads(pickle.dumps(pack_shard(plan, number, store))) for number in (2, 0, 1)]
    finish(plan, results, store)
    assert content(store) == reference


@pytest.mark.parametrize("num_writes", range(11))
def test_packing_cut_off_at_any_write_resumes_to_the_same_bytes(
    num_writes: int, videos: VideoSet, reference: dict[str, bytes], tmp_path: Path, numbered, watched
) -> None:
    store, plan = open_store(str(tmp_path)), plan_packing(videos, SMALL)
    with pytest.raises(numbered.power_cut):
        numbered.pack(plan, watched(store, writes_until_power_cut=num_writes))
    if num_writes < 8:  # 3 times shard and part, rejected, index: before that there is no set
        said = f"{tmp_path} is not finished: " if num_writes else f"there is no set at {tmp_path}: "
        with pytest.raises(UserError, match=said):
            load_index(store)
    again = watched(store)
    numbered.pack(plan, again)
    assert content(store) == reference
    kept = min(3, num_writes // 2)
    assert [path for path in again.writes if path.endswith(".tar")] == [f"shards/{n:06d}.tar" for n in range(kept, 3)]


def test_packing_a_finished_set_again_changes_nothing(packed, numbered, watched) -> None:
    store = watched(packed.store)
    assert numbered.pack(packed.plan, store).fingerprint == packed.index.fingerprint
    assert store.writes == []
    index = finished_set(packed.plan, packed.store)
    assert index is not None
    assert index.fingerprint == packed.index.fingerprint


def test_set_of_another_plan_is_never_packed_over(packed, videos: VideoSet, watched) -> None:
    other = plan_packing(videos, replace(packed.plan.options, jpeg_quality=50))
    message = (
        f"finished set 'numbers' of plan {packed.plan.fingerprint[:12]}.*is plan {other.fingerprint[:12]}: .*choose"
    )
    store = watched(packed.store)
    with pytest.raises(ValueError, match=message):
        finished_set(other, store)
    with pytest.raises(ValueError, match=message):
        pack_shard(other, 0, store)
    assert store.writes == []


def test_parts_of_another_plan_are_never_mixed_in(
    videos: VideoSet, reference: dict[str, bytes], tmp_path: Path, numbered
) -> None:
    store = open_store(str(tmp_path))
    plan, other = (
        plan_packing(videos, SMALL),
        plan_packing(videos, replace(SMALL, jpeg_quality=50, shard_megabytes=0.0005)),
    )
    assert len(other.shards) > len(plan.shards)
    pack_shard(plan, 0, store)
    for number in range(len(other.shards)):
        assert not pack_shard(other, number, store).reused
    numbered.pack(plan, store)
    assert content(store) == reference


def test_shard_overwritten_by_another_plan_is_packed_again_even_if_that_was_cut_off(
    videos: VideoSet, reference: dict[str, bytes], tmp_path: Path, numbered, watched
) -> None:
    plan, other = plan_packing(videos, SMALL), plan_packing(videos, replace(SMALL, jpeg_quality=50))
    for num_writes in range(3):
        store = open_store(str(tmp_path / str(num_writes)))
        pack_shard(plan, 0, store)
        with pytest.raises(numbered.power_cut):
            pack_shard(other, 0, watched(store, writes_until_power_cut=num_writes))
        numbered.pack(plan, store)
        assert content(store) == reference


def test_shards_of_a_job_beside_are_noticed(videos: VideoSet, tmp_path: Path) -> None:
    store, plan = open_store(str(tmp_path)), plan_packing(videos, SMALL)
    results = [pack_shard(plan, number, store) for number in range(3)]
    store.write("shards/000001.tar", b"of another job")
    with pytest.raises(ValueError, match=r"shards/000001\.tar has 14 bytes instead of .*: another job packs"):
        finish(plan, results, store)
    assert not store.exists("index.parquet")


@pytest.mark.parametrize("same_plan", [True, False])
def test_of_two_jobs_that_finish_at_once_one_wins(
    same_plan: bool, videos: VideoSet, tmp_path: Path, numbered, watched
) -> None:
    store, plan = open_store(str(tmp_path)), plan_packing(videos, SMALL)
    winner = plan if same_plan else plan_packing(videos, replace(SMALL, jpeg_quality=50))

    class BesideAnother(watched):
        def write_if_absent(self, path: str, data: bytes) -> bool:
            numbered.pack(winner, store)
            return super().write_if_absent(path, data)

    if same_plan:
        assert numbered.pack(plan, BesideAnother(store)).plan == plan.fingerprint
    else:
        with pytest.raises(ValueError, match="holds the finished set 'numbers' of plan"):
            numbered.pack(plan, BesideAnother(store))
    assert load_index(store).plan == winner.fingerprint


def test_plan_is_another_if_anything_that_goes_in_is_another(tmp_path: Path, numbered) -> None:
    folder = numbered.folders(tmp_path / "v", videos_per_action=2)
    videos = scan("numbers", folder, "folders")
    plans = {plan_packing(videos, SMALL).fingerprint}
    assert plan_packing(scan("numbers", folder, "folders"), SMALL).fingerprint in plans
    plans |= {plan_packing(videos, replace(SMALL, **{f: 24})).fingerprint for f in ("num_frames", "short_side", "seed")}
    plans.add(plan_packing(videos, replace(SMALL, jpeg_quality=32)).fingerprint)
    plans.add(plan_packing(videos, replace(SMALL, shard_megabytes=32.0)).fingerprint)
    plans.add(plan_packing(replace(videos, name="other"), SMALL).fingerprint)
    plans.add(plan_packing(replace(videos, actions=videos.actions[::-1]), SMALL).fingerprint)
    for change in ({"splits": ("unused",) * 3}, {"group": "other"}):
        changed = (replace(videos.videos[0], **change), *videos.videos[1:])
        plans.add(plan_packing(replace(videos, videos=changed), SMALL).fingerprint)
    plans.add(plan_packing(videos, replace(SMALL, format="video")).fingerprint)
    first = videos.videos[0].path
    changed = bytearray(first.read_bytes())
    for place in (0, len(changed) // 2, -1):  # a video edited in place keeps its size, and often its ends
        changed[place] ^= 1
        first.write_bytes(changed)
        plans.add(plan_packing(videos, SMALL).fingerprint)
    assert len(plans) == 14


def test_bad_videos_are_rejected_with_their_reasons(tmp_path: Path, numbered) -> None:
    folder = numbered.folders(tmp_path / "v", videos_per_action=2)
    (folder / "wave" / "empty.mp4").touch()
    (folder / "wave" / "text.mp4").write_text("no video" * 100)
    whole = (folder / "wave" / "clip 0.avi").read_bytes()
    (folder / "clap" / "cut.avi").write_bytes(whole[: len(whole) // 2])
    (folder / "jump" / "gone.avi").write_bytes(whole)
    videos = scan("numbers", folder, "folders")
    (folder / "jump" / "gone.avi").unlink()
    plan = plan_packing(videos, SMALL)
    store = open_store(str(tmp_path / "set"))
    index = numbered.pack(plan, store)
    assert len(index.clips_table) == 6
    rejected = pq.read_table(tmp_path / "set" / "rejected.parquet").to_pylist()
    assert [row["path"] for row in rejected] == ["clap/cut.avi", "jump/gone.avi", "wave/empty.mp4", "wave/text.mp4"]
    for row, reason in zip(rejected, ("is truncated", "does not exist", "is empty", "cannot be read"), strict=True):
        assert row["reason"].startswith(reason)
    again = [pack_shard(plan, number, store) for number in range(len(plan.shards))]
    assert sorted(path for result in again for path, _ in result.rejected) == [row["path"] for row in rejected]


def test_set_of_nothing_but_bad_videos_is_an_error(tmp_path: Path, numbered) -> None:
    (tmp_path / "v" / "wave").mkdir(parents=True)
    (tmp_path / "v" / "wave" / "empty.mp4").touch()
    plan = plan_packing(scan("numbers", tmp_path / "v", "folders"), SMALL)
    message = r"none of the 1 videos can be packed; .*rejected\.parquet, .*, wave/empty\.mp4: is empty"
    with pytest.raises(ValueError, match=message):
        numbered.pack(plan, open_store(str(tmp_path / "set")))


def test_names_in_any_script_are_packed_and_found_again(tmp_path: Path, numbered) -> None:
    names = [
        "wave/ходьба 1.v2.avi",
        "wave/a%20b.avi",
        "wave/a b.avi",
        "wave/" + "long" * 40 + ".avi",
        "wave/caf\udce9.avi",
    ]
    for number, name in enumerate(names):
        numbered.write(tmp_path / "v" / "wave" / "plain.avi", 3 + number).rename(tmp_path / "v" / name)
    plan, store = plan_packing(scan("s", tmp_path / "v", "folders"), SMALL), open_store(str(tmp_path / "set"))
    table = numbered.pack(plan, store).clips_table.table
    assert table.schema.equals(SCHEMA)
    assert sorted(path_of(key) for key in table["key"].to_pylist()) == sorted(names)
    assert "wave/caf\\xe9.avi" in table["source"].to_pylist()
    shards = sorted(Path(store.uri, "shards").iterdir())
    keys = [sample["__key__"] for path in shards for sample in read_by_webdataset(path)]
    assert sorted(keys) == sorted(key_of(name) for name in names)


@pytest.mark.parametrize("field", ["num_frames", "short_side", "jpeg_quality", "shard_megabytes"])
def test_options_out_of_range_name_themselves(field: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} is 0(\.0)?: choose"):
        PackOptions(**{field: 0.0 if field == "shard_megabytes" else 0})


def test_packing_to_s3_gives_the_same_bytes(
    videos: VideoSet, reference: dict[str, bytes], local_s3, numbered, tmp_path: Path
) -> None:
    store = open_store("s3://tavlad/test_pack", local_s3)
    numbered.pack(plan_packing(videos, SMALL), store)
    assert content(store) == reference


def test_jpeg_quality_is_obeyed(videos: VideoSet, tmp_path: Path) -> None:
    sizes: list[int] = []
    for quality in (20, 90):
        plan = plan_packing(videos, PackOptions(num_frames=1, jpeg_quality=quality))
        pack_shard(plan, 0, open_store(str(tmp_path / str(quality))))
        shard = (tmp_path / str(quality) / "shards" / "000000.tar").read_bytes()
        jpegs = read_tar_members(shard.removesuffix(END_OF_SHARD))[1::2]
        assert decode_jpeg(jpegs[0]).shape == (3, 48, 64)
        sizes.append(sum(map(len, jpegs)))
    assert sizes[0] < sizes[1]


def test_source_that_changes_or_vanishes_after_planning_stops_the_job(tmp_path: Path, numbered) -> None:
    folder, store = numbered.folders(tmp_path / "v", videos_per_action=1), open_store(str(tmp_path / "set"))
    plan = plan_packing(scan("numbers", folder, "folders"), SMALL)
    path = folder / "wave" / "clip 0.avi"
    whole = path.read_bytes()
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=r"wave/clip 0\.avi has changed since packing began: run the same command"):
        pack_shard(plan, 0, store)
    path.unlink()  # or it is on a disk that this node does not see: no reason to publish a set without it
    with pytest.raises(ValueError, match=r"clip 0\.avi cannot be read on .*readable at the same path on every node"):
        pack_shard(plan, 0, store)
    assert store.list() == []
    path.write_bytes(whole)
    assert pack_shard(plan, 0, store).rejected == ()


@pytest.mark.parametrize("num_threads", [2, 5])
def test_bytes_do_not_depend_on_threads_and_a_task_needs_its_own_clips_only(
    num_threads: int, videos: VideoSet, reference: dict[str, bytes], tmp_path: Path
) -> None:
    store, plan = open_store(str(tmp_path)), plan_packing(videos, SMALL)
    told: list[int] = []
    results = [
        pack_shard(plan.only(n), n, store, num_threads=num_threads, advance=lambda done, _: told.append(done))
        for n in range(3)
    ]
    assert told == 3 * [1, 2, 3, 4, 5, 6], "progress is by clips"
    assert sum(map(len, plan.only(1).shards)) == 6
    finish(plan, results, store)
    assert content(store) == reference


def test_kept_shards_are_those_of_the_plan_that_are_whole(videos: VideoSet, tmp_path: Path) -> None:
    plan, other = plan_packing(videos, SMALL), plan_packing(videos, replace(SMALL, jpeg_quality=50))
    store = open_store(str(tmp_path))
    for number in (0, 1, 2):
        pack_shard(plan, number, store)
    pack_shard(other, 1, store)
    assert [result.number for result in kept_shards(plan, store)] == [0, 2]
    store.write("shards/000000.tar", store.read("shards/000000.tar")[:-1])
    store.delete("shards/000002.tar")
    store.write("parts/000001.parquet", b"no Parquet")
    assert kept_shards(plan, store) == []
    assert [pack_shard(plan, number, store).reused for number in range(3)] == [False] * 3


def test_store_that_goes_away_in_mid_packing_is_waited_for(
    videos: VideoSet, reference: dict[str, bytes], tmp_path: Path, numbered, watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.patience.sleep", lambda seconds: None)

    class Ailing(watched):
        away = 0

        def upload(self, local: Path, path: str) -> None:
            Ailing.away += 1
            if Ailing.away % 3:  # twice each time
                raise StoreUnreachable("no S3 server answers")
            super().upload(local, path)

    notes: list[str] = []
    store, plan = open_store(str(tmp_path)), plan_packing(videos, SMALL)
    results = [pack_shard(plan, n, Ailing(store), advance=lambda _, note: notes.append(note)) for n in range(3)]
    finish(plan, results, store)
    assert content(store) == reference
    assert Ailing.away == 9
    assert notes.count("waiting for the store, which does not answer") == 3
    assert notes[-1] == ""


def test_patience_ends_and_is_for_silence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("shards.patience.sleep", pauses.append)
    monkeypatch.setattr("shards.patience.monotonic", lambda: sum(pauses))

    def fail(error: type[Exception]) -> None:
        raise error("it says why")

    with pytest.raises(StoreUnreachable):
        outlast(lambda: fail(StoreUnreachable), seconds=30.0)
    assert 20 < sum(pauses) <= 30
    pauses.clear()
    with pytest.raises(AccessRefused):
        outlast(lambda: fail(AccessRefused))
    assert pauses == []


def test_rows_left_by_a_job_killed_while_it_tidied_up_are_removed(
    videos: VideoSet, reference: dict[str, bytes], tmp_path: Path, numbered, watched
) -> None:
    store, plan = open_store(str(tmp_path)), plan_packing(videos, SMALL)
    with pytest.raises(numbered.power_cut):
        numbered.pack(plan, watched(store, writes_until_power_cut=9))
    assert len(store.list("parts/")) == 2
    finish(plan, [], store)
    assert content(store) == reference
