"""Reading clips, side by side: this reader, other loaders, decoding the original videos, and the limit of the decoder.

python benchmarks/reading.py VIDEOS [--name NAME] [--crop 224] [--repeats 3] [--out FOLDER]

VIDEOS is a folder with a folder of videos an action; without it 64 videos are rendered. They are packed, put on a real
S3 server of this machine (which takes its share of the same cores), and read by each variant in a process of its own,
in turn. The limit decodes the set's JPEGs from memory in a bare loop in as many processes as others have workers.
Loaders that are not installed are left out: pip install mosaicml-streaming litdata torchcodec, in an environment of
their own. `--steps` says instead where the reader's time goes, on one thread. One long file, so that what is compared
can be seen at once.
"""

import argparse
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import psutil
import pyarrow as pa
import torch
from pyarrow import parquet as pq

from benchmarks.harness import Figures, Meter, interleaved, machine_facts, write_results
from shards.clip_bytes import END_OF_SHARD, decode_jpeg, frame_files, read_tar_members, tar_members
from shards.clip_view import decode_window
from shards.datasets import scan
from shards.disk_cache import DiskCache
from shards.index import ClipTable, Index, load_index
from shards.jpeg_crop import JpegCrop, JpegHeader
from shards.pack import finish, pack_shard
from shards.plan import PackOptions, plan_packing
from shards.read import ClipLoader, LoaderOptions
from shards.store import S3Access, Store, open_store
from shards.transforms import VIEWS, crop_clip, draw_view, window_of

BATCH = 8
CLIPS_AN_EPOCH = 1600
COLD_CLIPS = 960
_COLD = "cold"
WARM_UP, MEASURED, SECONDS_AT_MOST = 8, 100, 4.0
Batches = Iterator[Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every variant is told."""

    folder: Path
    videos: Path
    s3: S3Access
    crop: int
    processes: int
    server: int
    """The S3 server's process."""

    @property
    def local(self) -> Store:
        return open_store(str(self.folder / "set"))

    @property
    def remote(self) -> Store:
        return open_store("s3://tavlad/bench", self.s3)

    @property
    def clips(self) -> list[bytes]:
        """All packed clips, as they lie in the shards."""
        table = load_index(self.local).clips_table
        places = [table.place(row) for row in range(len(table))]
        return [self.local.read_range(place.shard, place.offset, place.length) for place in places]


# --- this reader


class _Counted(Store):
    """Counts what is read by range."""

    def __init__(self, store: Store) -> None:
        self.uri, self._store, self.num_bytes = store.uri, store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        self.num_bytes += length
        return self._store.read_range(path, offset, length)


_Counted.__abstractmethods__ = frozenset()


def _long(index: Index) -> Index:
    """The index with its clips over and over, so that an epoch lasts."""
    table = index.clips_table.table
    rows = table.take([row % len(table) for row in range(CLIPS_AN_EPOCH)])
    keys = pa.array([f"{key}-{number}" for number, key in enumerate(rows["key"].to_pylist())])
    rows = rows.set_column(0, "key", keys).set_column(3, "split1", pa.array(["train"] * CLIPS_AN_EPOCH))
    return dataclasses.replace(index, clips_table=ClipTable.of(rows))


def _options(bench: Bench) -> LoaderOptions:
    return LoaderOptions(
        batch_size=BATCH, seed=0, crop=bench.crop, augment=True, shuffle=True, num_threads=bench.processes
    )


def _ours(bench: Bench, store: Store, cache: DiskCache | None) -> Figures:
    counted = _Counted(store)
    loader = ClipLoader(_long(load_index(bench.local)), counted, 1, "train", _options(bench), cache=cache)
    return _measure(loader.epoch(0), lambda: counted.num_bytes)


def ours_from_disk(bench: Bench) -> Figures:
    return _ours(bench, bench.local, None)


def _filled_cache(bench: Bench) -> DiskCache:
    cache = DiskCache(folder=bench.folder / "cache", max_bytes=10**10, set_name="bench")
    table = load_index(bench.local).clips_table
    for place, clip in zip(map(table.place, range(len(table))), bench.clips, strict=True):
        cache.put(place.sha256, clip)
    return cache


def ours_warm(bench: Bench) -> Figures:
    return _ours(bench, bench.remote, _filled_cache(bench))


def ours_cold(bench: Bench) -> Figures:
    """A whole first epoch, from its first batch to its last, of clips that all differ, into an empty cache."""
    store = _Counted(bench.remote.child(_COLD))
    table = ClipTable.of(pq.read_table(bench.folder / f"{_COLD}.parquet"))
    index = dataclasses.replace(load_index(bench.local), clips_table=table)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        cache = DiskCache(folder=Path(folder), max_bytes=10**10, set_name="bench")
        loader = ClipLoader(index, store, 1, "train", _options(bench), cache=cache)
        server, meter = psutil.Process(bench.server), Meter()
        meter.start()
        before = sum(server.cpu_times()[:2])
        clips = sum(len(batch.keys) for batch in loader.epoch(0))
        took = sum(server.cpu_times()[:2]) - before
        figures = meter.stop(clips) | {"network_kb_a_clip": store.num_bytes / clips / 1000}
        return figures | {"server_cpu_ms_a_clip": 1000 * took / clips}


def _write_cold_set(bench: Bench) -> None:
    """The set's clips under more names, in shards of the usual size: as many different clips as it takes."""
    table = load_index(bench.local).clips_table.table
    rows = table.take([number % len(table) for number in range(COLD_CLIPS)])
    clips, shard, shards = bench.clips, b"", 0
    found: dict[str, list[Any]] = {name: [] for name in ("key", "shard", "offset", "length", "sha256")}
    for number, key in enumerate(rows["key"].to_pylist()):
        facts, *jpegs = map(bytes, read_tar_members(clips[number % len(clips)]))
        members = tar_members(f"{key}-{number}", frame_files(json.loads(facts), jpegs))
        place = (f"{key}-{number}", f"shards/{shards:06}.tar", len(shard), len(members))
        for name, value in zip(found, (*place, hashlib.sha256(members).hexdigest()), strict=True):
            found[name].append(value)
        shard += members
        if len(shard) > PackOptions().shard_megabytes * 1e6 or number == COLD_CLIPS - 1:
            bench.remote.child(_COLD).write(place[1], shard + END_OF_SHARD)
            shard, shards = b"", shards + 1
    for name, values in (found | {"split1": ["train"] * COLD_CLIPS}).items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    pq.write_table(rows, bench.folder / f"{_COLD}.parquet")


def _read_for_ever(bench: Bench, seed: int, cache: DiskCache, done: Any) -> None:
    torch.set_num_threads(1)
    options = LoaderOptions(batch_size=BATCH, seed=seed, crop=bench.crop, augment=True, shuffle=True, num_threads=0)
    loader = ClipLoader(_long(load_index(bench.local)), bench.remote, 1, "train", options, cache=cache)
    for batch in itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count()):
        with done.get_lock():
            done.value += len(batch.keys)


def ours_in_processes(bench: Bench) -> Figures:
    """What would be gained at most if processes read in the threads' place: their batches go nowhere."""
    cache = _filled_cache(bench)
    return _count_of(bench, lambda first, done: (_read_for_ever, (bench, first, cache, done)))


# --- the limit


def _decode_for_ever(clips: Sequence[bytes], first: int, done: Any) -> None:
    torch.set_num_threads(1)
    jpegs = [
        [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in read_tar_members(clip)[1:]] for clip in clips
    ]
    number = first
    while True:
        for jpeg in jpegs[number % len(jpegs)]:
            torch.ops.image.decode_jpeg(jpeg, 3)
        with done.get_lock():
            done.value += 1
        number += 1


def limit(bench: Bench) -> Figures:
    clips = bench.clips
    return _count_of(bench, lambda first, done: (_decode_for_ever, (clips, first * 7, done)))


def _count_of(bench: Bench, work: Callable[[int, Any], tuple[Callable[..., None], tuple[Any, ...]]]) -> Figures:
    """The clips that processes count together."""
    done = multiprocessing.Value("l", 0)
    works = [work(first, done) for first in range(bench.processes)]
    workers = [multiprocessing.Process(target=target, args=told, daemon=True) for target, told in works]
    for worker in workers:
        worker.start()
    while done.value < WARM_UP * BATCH:
        time.sleep(0.01)
    meter, before = Meter(), done.value
    meter.start()
    while done.value - before < MEASURED * BATCH and meter.seconds < SECONDS_AT_MOST:
        time.sleep(0.01)
    figures = meter.stop(done.value - before)
    for worker in workers:
        worker.kill()
    return figures | {"network_kb_a_clip": 0.0}


# --- other loaders


def _with_pil(jpegs: Sequence[bytes], key: str, crop: int) -> torch.Tensor:
    from PIL import Image

    frames: list[np.ndarray] = []
    for jpeg in jpegs:
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        top, left, height, width, flip = window_of(draw_view(0, 0, key), image.height, image.width, crop)
        image = image.resize((crop, crop), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
        frames.append(np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image))
    return torch.from_numpy(np.stack(frames)).movedim(-1, 1)


def _with_torchvision(members: bytes, key: str, crop: int) -> torch.Tensor:
    images = [decode_jpeg(jpeg).movedim(0, -1) for jpeg in read_tar_members(members)[1:]]
    return crop_clip(torch.stack(images).movedim(-1, 1), draw_view(0, 0, key), crop)


def _webdataset(bench: Bench, urls: list[str], counted: Any) -> Figures:
    import webdataset as wds
    from torch.utils.data import DataLoader

    def open_s3(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> Any:
        data = open_store(url.rpartition("/")[0], bench.s3).read(url.rpartition("/")[2])
        with counted.get_lock():
            counted.value += len(data)
        return io.BytesIO(data)

    wds.gopen_schemes["s3"] = open_s3

    def clip(sample: dict[str, Any]) -> torch.Tensor:
        jpegs = [sample[name] for name in sorted(sample) if name.endswith(".jpg")]
        return _with_pil(jpegs, sample["__key__"], bench.crop)

    repeated = urls * (CLIPS_AN_EPOCH // len(load_index(bench.local).clips_table) + 1)
    dataset = wds.WebDataset(repeated, shardshuffle=100, empty_check=False).shuffle(50).map(clip)
    loader = DataLoader(dataset, batch_size=BATCH, num_workers=bench.processes, prefetch_factor=2)
    return _measure(iter(loader), lambda: counted.value)


def _shards(store: Store) -> list[str]:
    return [path for path in store.list("shards/") if path.endswith(".tar")]


def webdataset_from_disk(bench: Bench) -> Figures:
    urls = [f"{bench.local.uri}/{path}" for path in _shards(bench.local)]
    return _webdataset(bench, urls, multiprocessing.Value("l", 0))


def webdataset_from_s3(bench: Bench) -> Figures:
    urls = [f"{bench.remote.uri}/{path}" for path in _shards(bench.local)]
    return _webdataset(bench, urls, multiprocessing.Value("l", 0))


def mosaicml_streaming(bench: Bench) -> Figures:
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    folder = bench.folder / "mds"
    if not folder.exists():
        with MDSWriter(columns={"clip": "bytes", "number": "int"}, out=str(folder)) as out:
            for number, clip in enumerate(_repeated(bench)):
                out.write({"clip": clip, "number": number})

    class Clips(StreamingDataset):
        def __getitem__(self, at: int) -> torch.Tensor:
            sample = super().__getitem__(at)
            return _with_torchvision(sample["clip"], str(sample["number"]), bench.crop)

    dataset = Clips(local=str(folder), batch_size=BATCH, shuffle=True)
    return _measure(iter(DataLoader(dataset, batch_size=BATCH, num_workers=bench.processes)), lambda: 0)


_litdata_clips: list[bytes] = []


def _litdata_sample(number: int) -> dict[str, Any]:
    return {"clip": _litdata_clips[number % len(_litdata_clips)], "number": number}


def litdata(bench: Bench) -> Figures:
    import litdata as lit

    folder = bench.folder / "litdata"
    _litdata_clips[:] = bench.clips
    if not folder.exists():
        numbers = list(range(CLIPS_AN_EPOCH))
        lit.optimize(
            fn=_litdata_sample,
            inputs=numbers,
            output_dir=str(folder),
            chunk_bytes="64MB",
            num_workers=1,
            start_method="fork",
        )

    class Clips(lit.StreamingDataset):
        def __getitem__(self, at: Any) -> torch.Tensor:
            sample = super().__getitem__(at)
            return _with_torchvision(sample["clip"], str(sample["number"]), bench.crop)

    loader = lit.StreamingDataLoader(Clips(str(folder), shuffle=True), batch_size=BATCH, num_workers=bench.processes)
    return _measure(iter(loader), lambda: 0)


def _repeated(bench: Bench) -> Iterator[bytes]:
    clips = bench.clips
    return (clips[number % len(clips)] for number in range(CLIPS_AN_EPOCH))


# --- the original videos


class _Videos(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, bench: Bench, decode: Callable[[Path], torch.Tensor]) -> None:
        paths = sorted(path for path in bench.videos.rglob("*") if path.suffix in (".avi", ".mp4"))
        self._paths = [paths[number % len(paths)] for number in range(CLIPS_AN_EPOCH)]
        self._decode, self._crop = decode, bench.crop

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> torch.Tensor:
        return crop_clip(self._decode(self._paths[number]), draw_view(0, 0, str(number)), self._crop)


def _with_pyav(path: Path) -> torch.Tensor:
    """Only the wanted frames are converted; all up to the last of them must be decoded."""
    import av

    torch.set_num_threads(1)
    with av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        decoded = list(container.decode(stream))
    wanted = [decoded[sample * len(decoded) // 25] for sample in range(25)]
    return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in wanted]).movedim(-1, 1)


def _with_torchcodec(path: Path) -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1)
    num_frames = len(decoder)
    return decoder.get_frames_at([sample * num_frames // 25 for sample in range(25)]).data


def _videos(bench: Bench, decode: Callable[[Path], torch.Tensor]) -> Figures:
    from torch.utils.data import DataLoader

    dataset = _Videos(bench, decode)
    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        shuffle=True,
        num_workers=bench.processes,
        collate_fn=lambda clips: torch.stack(clips),
    )
    return _measure(iter(loader), lambda: 0)


def videos_with_pyav(bench: Bench) -> Figures:
    return _videos(bench, _with_pyav)


def videos_with_torchcodec(bench: Bench) -> Figures:
    try:
        import torchcodec.decoders  # noqa: F401  its absence is told before workers start
    except RuntimeError as error:
        raise RuntimeError("torchcodec does not find FFmpeg's shared libraries on this machine") from error

    return _videos(bench, _with_torchcodec)


VARIANTS: dict[str, Callable[[Bench], Figures]] = {
    "limit: bare JPEG decoding": limit,
    "tavlad, local disk": ours_from_disk,
    "tavlad, S3, node's cache warm": ours_warm,
    "tavlad, S3, node's cache cold": ours_cold,
    "tavlad, warm, processes for threads": ours_in_processes,
    "webdataset + PIL, local disk": webdataset_from_disk,
    "webdataset + PIL, S3": webdataset_from_s3,
    "mosaicml-streaming, local disk": mosaicml_streaming,
    "litdata, local disk": litdata,
    "original videos, PyAV": videos_with_pyav,
    "original videos, torchcodec": videos_with_torchcodec,
}


def _measure(batches: Batches, network_bytes: Callable[[], int]) -> Figures:
    """Clips a second and the rest, of batches after a few that warm up."""
    for _ in range(WARM_UP):
        next(batches)
    meter, clips, before = Meter(), 0, network_bytes()
    meter.start()
    while clips < MEASURED * BATCH and meter.seconds < SECONDS_AT_MOST:
        batch = next(batches)
        clips += len(getattr(batch, "keys", batch))
    return meter.stop(clips) | {"network_kb_a_clip": (network_bytes() - before) / clips / 1000}


def _of_the_limit(row: Figures, limit: Figures | None) -> Figures:
    """By the clock, and by processor time, which other work on the machine disturbs less."""
    if limit is None:
        return {}
    return {
        "of_the_limit": row["clips_per_second"] / limit["clips_per_second"],
        "of_the_limit_by_cpu": limit["cpu_ms_a_clip"] / row["cpu_ms_a_clip"],
    }


def _in_a_process(bench: Bench, name: str) -> Figures:
    told = {"variant": name, "folder": str(bench.folder), "videos": str(bench.videos), "crop": bench.crop}
    told |= {"processes": bench.processes, "server": bench.server, "s3": dataclasses.asdict(bench.s3)}
    command = [sys.executable, __file__, "--child"]
    ended = subprocess.run(command, input=json.dumps(told), capture_output=True, text=True, timeout=600)
    if ended.returncode:
        raise RuntimeError(ended.stderr or f"it ended with {ended.returncode}")
    return json.loads(ended.stdout.splitlines()[-1])


def _child() -> None:
    told = json.loads(sys.stdin.read())
    bench = Bench(
        folder=Path(told["folder"]),
        videos=Path(told["videos"]),
        s3=S3Access(**told["s3"]),
        crop=told["crop"],
        processes=told["processes"],
        server=told["server"],
    )
    print(json.dumps(VARIANTS[told["variant"]](bench)), flush=True)
    os._exit(0)  # without waiting for loaders that end slowly


def _steps(store: Store, crop: int, repeats: int) -> dict[str, Figures]:
    """CPU ms a clip that each step of reading takes, and that decoding whole JPEGs would."""
    torch.set_num_threads(1)
    table, decode, clock = load_index(store).clips_table, decode_window, time.thread_time
    out_TCSS: Any = None
    rounds: list[Figures] = []
    for number in range(repeats + 1):
        spent: Figures = dict.fromkeys(("read", "digest", "cut", "decode_whole", "decode", "decode_and_place"), 0.0)
        for row in range(len(table)):
            place = table.place(row)
            moments = [clock()]
            members = store.read_range(place.shard, place.offset, place.length)
            moments.append(clock())
            hashlib.sha256(members).hexdigest()
            moments.append(clock())
            jpegs = read_tar_members(members)[1:]
            header = JpegHeader.of(jpegs[0])
            window = window_of(VIEWS[(row + number) % len(VIEWS)], header.height, header.width, crop)
            cut = JpegCrop(header, *window[:4])
            data, lengths = cut.crop(jpegs)
            moments.append(clock())
            parts = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
            kept = torch.frombuffer(data, dtype=torch.uint8)
            if out_TCSS is None:
                out_TCSS = torch.empty((len(jpegs), crop, crop, 3), dtype=torch.uint8).movedim(-1, 1)
            start = clock()
            for jpeg in parts:
                torch.ops.image.decode_jpeg(jpeg, 3)
            whole = clock()
            for jpeg in kept.split(lengths):
                torch.ops.image.decode_jpeg(jpeg, 3)
            decoded = clock()
            decode(kept, lengths, window.top - cut.top, window.left - cut.left, *window[2:], out_TCSS)
            took = [later - sooner for sooner, later in itertools.pairwise(moments)]
            took += [whole - start, decoded - whole, clock() - decoded]
            for step, seconds in zip(spent, took, strict=True):
                spent[step] += 1000 * seconds / len(table)
        rounds.append(spent)
    del rounds[0]  # which warmed up
    return {step: {"cpu_ms_a_clip": statistics.median(each[step] for each in rounds)} for step in rounds[0]}


def _prepare(videos: Path, store: Store) -> Index:
    plan = plan_packing(scan("bench", videos, "folders"), PackOptions())
    return finish(plan, [pack_shard(plan, number, store) for number in range(len(plan.shards))], store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="?", type=Path)
    parser.add_argument("--name", default="reading")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="variants whose names contain one of these words, comma between")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--steps", action="store_true", help="where the reader's time goes, instead")
    options = parser.parse_args()
    from infra import local

    with tempfile.TemporaryDirectory(prefix="tavlad-bench-") as name:
        folder = Path(name)
        os.environ["TAVLAD_HOME"] = str(folder / "home")
        videos = options.videos
        if videos is None:
            from shards.render import render_videos

            videos = folder / "videos"
            render_videos(videos, 8, 0)
        store = open_store(str(folder / "set"))
        index = _prepare(videos, store)
        if options.steps:
            facts = {"clips": len(index.clips_table), "crop": options.crop} | machine_facts(("torch", "torchvision"))
            steps = _steps(store, options.crop, options.repeats)
            write_results(options.out, f"{options.name}-steps", facts, {"steps": steps})
            return
        try:
            s3 = local.up(services=["s3"]).s3
            server = next(service.pid for service in local.status() if service.name == "s3") or 0
            bench = Bench(
                folder=folder, videos=videos, s3=s3, crop=options.crop, processes=options.processes, server=server
            )
            for path in store.list():
                bench.remote.write(path, store.read(path))
            _write_cold_set(bench)
            words = options.only.split(",")
            chosen = [name for name in VARIANTS if any(word in name for word in words)]
            found = interleaved(
                {name: lambda name=name: _in_a_process(bench, name) for name in chosen}, options.repeats
            )
        finally:
            local.down()
    rows = {name: row | _of_the_limit(row, found.get("limit: bare JPEG decoding")) for name, row in found.items()}
    packages = ("torch", "torchvision", "webdataset", "pillow", "av", "mosaicml-streaming", "litdata", "torchcodec")
    facts = {"clips": len(index.clips_table), "crop": options.crop, "processes": options.processes}
    facts |= {"batch": BATCH, "repeats": options.repeats} | machine_facts(packages)
    write_results(options.out, options.name, facts, {options.name: rows})


if __name__ == "__main__":
    _child() if "--child" in sys.argv else main()
