"""Videos become a shard set (contract 1): plan once, pack each shard anywhere, finish once.

The three steps know nothing of the cluster that runs them. A shard's bytes are a function of the plan, so a shard
packed twice, or by a task that was thought dead, is the same shard; a restarted job finds the parts that are done.
The steps stand in one long file because each relies on what the one before has written, and in which order.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from shards.clip_bytes import END_OF_SHARD, encode_jpeg, frame_files, key_of, tar_members
from shards.datasets import Video, VideoSet
from shards.index import (
    FORMAT,
    INDEX_PATH,
    REJECTED_PATH,
    REJECTED_SCHEMA,
    SCHEMA,
    Index,
    index_bytes,
    load_index,
    make_index,
    read_table,
    rows_where,
    table_bytes,
)
from shards.store import Store
from shards.video import VideoError, decode_clip

_BYTES_PER_PIXEL = 0.3  # of a JPEG of quality 90, measured on real clips: 0.19 to 0.31
_MEGABYTE = 1_000_000
_PARALLEL_SHARDS = 8  # small sets are dealt to as many, so that they too are packed in parallel
_SKETCH_BYTES = 64 * 1024
_SHARDS, _PARTS = "shards/", "parts/"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackOptions:
    """How videos are packed. Every field is part of the set's fingerprint."""

    num_frames: int = 25
    """Frames per clip, T, uniform over the video."""
    short_side: int = 256
    """Pixels of the packed frames' short side; shorter videos keep theirs."""
    jpeg_quality: int = 90
    """1 to 100."""
    shard_megabytes: float = 64.0
    """Size aimed at, by estimate: see `plan_packing`."""
    seed: int = 0
    """Of the random order in which clips are dealt to shards."""

    def __post_init__(self) -> None:
        for field, low, high in (("num_frames", 1, 10_000), ("short_side", 16, 4096), ("jpeg_quality", 1, 100)):
            if not low <= getattr(self, field) <= high:
                raise ValueError(f"{field} is {getattr(self, field)}: choose {low} to {high}")
        if self.shard_megabytes <= 0:
            raise ValueError(f"shard_megabytes is {self.shard_megabytes}: choose a size above 0, such as 64")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """One video as the plan knows it."""

    key: str
    video: Video
    label: int
    num_bytes: int
    sketch: str
    """Digest of the file's first and last 64 KiB; empty if it cannot be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """What goes into which shard; `fingerprint` names all of it."""

    name: str
    actions: tuple[str, ...]
    options: PackOptions
    shards: tuple[tuple[PlannedClip, ...], ...]
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """What became of one shard."""

    number: int
    rows: pa.Table
    """Of its clips, schema of the index."""
    rejected: tuple[tuple[str, str], ...]
    """Path and reason of each video that could not be packed."""
    num_bytes: int
    reused: bool
    """Whether an earlier, interrupted job had packed it."""


def plan_packing(video_set: VideoSet, options: PackOptions) -> PackPlan:
    """Deals the videos to shards. Reads sizes and the ends of the files, decodes nothing.

    The number of shards follows from an estimate that needs no video: a frame of short side S is taken as 4:3, so
    S·S·4/3 pixels at 0.3 bytes. Videos are dealt in an order given by a digest of (seed, key), shard by shard.
    """
    with ThreadPoolExecutor(16) as pool:
        sketches = list(pool.map(_sketch, [video.path for video in video_set.videos]))
    labels = {action: label for label, action in enumerate(video_set.actions)}
    clips = [
        PlannedClip(key=key_of(video.name), video=video, label=labels[video.action], num_bytes=size, sketch=sketch)
        for video, (size, sketch) in zip(video_set.videos, sketches, strict=True)
    ]
    dealt = sorted(clips, key=lambda clip: (_digest([options.seed, clip.key]), clip.key))
    clip_bytes = options.num_frames * options.short_side**2 * 4 / 3 * _BYTES_PER_PIXEL
    num_shards = math.ceil(len(clips) * clip_bytes / (options.shard_megabytes * _MEGABYTE))
    num_shards = max(num_shards, min(_PARALLEL_SHARDS, math.ceil(len(clips) / _PARALLEL_SHARDS)))
    num_shards = min(num_shards, len(clips))
    bounds = [len(clips) * number // num_shards for number in range(num_shards + 1)]
    described = [
        [clip.key, clip.label, clip.video.splits, clip.video.group, clip.num_bytes, clip.sketch] for clip in dealt
    ]
    return PackPlan(
        name=video_set.name,
        actions=video_set.actions,
        options=options,
        shards=tuple(tuple(dealt[start:end]) for start, end in itertools.pairwise(bounds)),
        fingerprint=_digest(
            [FORMAT, video_set.name, video_set.actions, dataclasses.asdict(options), num_shards, described]
        ),
    )


def finished_set(plan: PackPlan, store: Store) -> Index | None:
    """The finished set at `store` if it is this plan's, None if there is none; ValueError if it is another's."""
    if not store.exists(INDEX_PATH):
        return None
    index = load_index(store)
    if index.plan != plan.fingerprint:
        raise ValueError(
            f"{store.uri} holds the finished set {index.name!r} of plan {index.plan[:12]}, and this is plan "
            f"{plan.fingerprint[:12]}: the videos, splits or options differ; choose another name, or delete that set"
        )
    return index


def pack_shard(plan: PackPlan, number: int, store: Store) -> ShardResult:
    """Decodes and writes shard `number`, then the row file that says it is done; or finds it done and reads that.

    Raises ValueError rather than touch the finished set of another plan.
    """
    index = finished_set(plan, store)
    if index is not None:
        return _finished_shard(plan, number, index, store)
    part_path = f"{_PARTS}{number:06d}.parquet"
    if store.exists(part_path):
        rows, described = read_table(store, part_path)
        if described.get("plan") == plan.fingerprint:
            return _result(number, rows, described, reused=True)
        store.delete(part_path)  # before its shard is overwritten, or that other plan would take our shard for its own
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "shard.tar")
        rows, rejected = _write_shard(plan, number, local)
        described = {"plan": plan.fingerprint, "rejected": rejected, "num_bytes": local.stat().st_size}
        store.upload(local, shard_path(number))
    store.write(part_path, table_bytes(rows, described))
    return _result(number, rows, described, reused=False)


def finish(plan: PackPlan, results: Sequence[ShardResult], store: Store) -> Index:
    """Writes rejected.parquet, then index.parquet: from then on the set exists.

    Raises ValueError if no video could be packed (rejected.parquet then says why), or if another job has finished
    another set here meanwhile.
    """
    index = finished_set(plan, store) or _publish(plan, results, store)
    for path in store.list(_PARTS):
        store.delete(path)
    return index


def shard_path(number: int) -> str:
    """Where a shard lies below its set."""
    return f"{_SHARDS}{number:06d}.tar"


def _publish(plan: PackPlan, results: Sequence[ShardResult], store: Store) -> Index:
    results = sorted(results, key=lambda result: result.number)
    assert [result.number for result in results] == list(range(len(plan.shards))), "one result a shard"
    _check_shards(plan, results, store)
    rejected = sorted(row for result in results for row in result.rejected)
    columns = [pa.array(column, pa.string()) for column in (zip(*rejected, strict=True) if rejected else ([], []))]
    table = pa.Table.from_arrays(columns, schema=REJECTED_SCHEMA)
    store.write(REJECTED_PATH, table_bytes(table, {"plan": plan.fingerprint}))
    rows = pa.concat_tables([result.rows for result in results])
    if not rows.num_rows:
        path, reason = rejected[0]
        raise ValueError(
            f"none of the {len(rejected)} videos can be packed; the reasons are in {store.uri}/{REJECTED_PATH}, "
            f"that of the first, {path}: {reason}"
        )
    index = make_index(
        name=plan.name,
        actions=plan.actions,
        packing=dataclasses.asdict(plan.options),
        num_frames=plan.options.num_frames,
        plan=plan.fingerprint,
        rows=rows,
    )
    if store.write_if_absent(INDEX_PATH, index_bytes(index)):
        return index
    finished = finished_set(plan, store)  # another job was quicker; raises if its plan was another
    assert finished is not None
    return finished


def _finished_shard(plan: PackPlan, number: int, index: Index, store: Store) -> ShardResult:
    """The result of a shard whose set is finished, so that packing again changes nothing."""
    rows = rows_where(index.clips_table.table, "shard", shard_path(number))
    names = {_printable(clip.video.name) for clip in plan.shards[number]}
    rejected = [row for row in read_table(store, REJECTED_PATH)[0].to_pylist() if row["path"] in names]
    described = {
        "rejected": [(row["path"], row["reason"]) for row in rejected],
        "num_bytes": store.size(shard_path(number)),
    }
    return _result(number, rows, described, reused=True)


def _check_shards(plan: PackPlan, results: Sequence[ShardResult], store: Store) -> None:
    """The shards are those of the results, and no shard of an abandoned plan is left beside them."""
    for result in results:
        path = shard_path(result.number)
        if store.size(path) != result.num_bytes:
            raise ValueError(
                f"{store.uri}/{path} has {store.size(path)} bytes instead of {result.num_bytes}: another job packs "
                "into the same place; let one of them finish, then run tavlad pack again"
            )
    known = {shard_path(number) for number in range(len(plan.shards))}
    for path in store.list(_SHARDS):
        if path not in known:
            store.delete(path)


def _write_shard(plan: PackPlan, number: int, local: Path) -> tuple[pa.Table, list[tuple[str, str]]]:
    rows: list[dict[str, object]] = []
    rejected: list[tuple[str, str]] = []
    offset = 0
    with local.open("wb") as file:
        for clip in plan.shards[number]:
            try:
                members, row = _pack_clip(plan, clip)
            except VideoError as error:
                rejected.append((_printable(clip.video.name), error.reason))
                continue
            row |= {"shard": shard_path(number), "offset": offset, "length": len(members)}
            rows.append(row | {"sha256": hashlib.sha256(members).hexdigest()})
            offset += file.write(members)
        file.write(END_OF_SHARD)
    return pa.Table.from_pylist(rows, schema=SCHEMA), rejected


def _pack_clip(plan: PackPlan, clip: PlannedClip) -> tuple[bytes, dict[str, object]]:
    """The clip's bytes in the shard, and its row but for where that is."""
    options, video = plan.options, clip.video
    decoded = decode_clip(video.path, options.num_frames, options.short_side)
    frames_TCHW = torch.from_numpy(decoded.frames_THWC).permute(0, 3, 1, 2)
    height, width = frames_TCHW.shape[-2:]
    described: dict[str, object] = {
        "key": clip.key,
        "action": video.action,
        "label": clip.label,
        "group": _printable(video.group),
        "source": _printable(video.name),
        "num_source_frames": decoded.num_source_frames,
        "source_fps": decoded.source_fps,
        "width": decoded.width,
        "height": decoded.height,
    }
    facts = described | {
        "splits": video.splits,
        "frame_indices": decoded.frame_indices,
        "frame_size": [width, height],
        "source_sha256": _file_digest(video.path),
    }
    jpegs = [encode_jpeg(frame_CHW, options.jpeg_quality) for frame_CHW in frames_TCHW]
    splits = {f"split{k}": part for k, part in enumerate(video.splits, start=1)}
    return tar_members(clip.key, frame_files(facts, jpegs)), described | splits


def _result(number: int, rows: pa.Table, described: dict[str, Any], reused: bool) -> ShardResult:
    return ShardResult(
        number=number,
        rows=rows.replace_schema_metadata(None),
        rejected=tuple((path, reason) for path, reason in described["rejected"]),
        num_bytes=described["num_bytes"],
        reused=reused,
    )


def _sketch(path: Path) -> tuple[int, str]:
    """Size, and a digest of the file's ends: quick, and no two encodings of a video share it."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(_SKETCH_BYTES)
            file.seek(max(0, size - _SKETCH_BYTES))
            return size, hashlib.sha256(head + file.read()).hexdigest()
    except OSError:
        return 0, ""  # packing will tell why


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(described: object) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _printable(path: str) -> str:
    """File names may hold bytes that are no text; tables may not. The key keeps them all."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
