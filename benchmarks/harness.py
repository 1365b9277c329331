"""What benchmarks share: interleaved repeats, medians, facts about the machine, tables and JSON.

Machines are noisy, so variants take turns, and what is compared are medians of the same rounds.
"""

import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

Figures = dict[str, float]


def interleaved(variants: Mapping[str, Callable[[], Figures]], repeats: int) -> dict[str, Figures]:
    """Each variant's medians over the repeats, in every one of which all variants run once, in turn.

    A variant that raises is left out from then on, and why is written to stderr.
    """
    found: dict[str, list[Figures]] = {name: [] for name in variants}
    out: set[str] = set()
    for repeat in range(repeats):
        for name, run in variants.items():
            if name in out:
                continue
            try:
                found[name].append(run())
            except Exception as error:  # noqa: BLE001  the others still can be compared
                out.add(name)
                print(f"left out: {name}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
                continue
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found[name][-1].items())
            print(f"{repeat + 1}/{repeats} {name}: {shown}", file=sys.stderr)
    return {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in found.items()
        if rounds and name not in out
    }


def timed(run: Callable[[], object]) -> Figures:
    """Milliseconds of one run, by the clock and of processor time, which other work on the machine disturbs less."""
    began, cpu_began = time.perf_counter(), time.process_time()
    run()
    return {"ms": 1000 * (time.perf_counter() - began), "cpu_ms": 1000 * (time.process_time() - cpu_began)}


def peak_mb(run: Callable[[], object]) -> float:
    """How far this process's memory rises above what it holds now. For a process of its own: memory that was freed
    before and not given back hides what is used again."""

    def kilobytes(key: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[key].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024 / 1e6


class Meter:
    """Seconds, CPU seconds and peak memory of this process and its children, between `start` and `stop`."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._peak = 0
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        self._sampler.start()
        self._cpu, self._began = self._cpu_seconds(), time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._began

    def stop(self, clips: int) -> Figures:
        """What reading so many clips took. Children must still live."""
        seconds, cpu = self.seconds, self._cpu_seconds() - self._cpu
        self._ended.set()
        self._sampler.join()
        return {"clips_per_second": clips / seconds, "cpu_ms_a_clip": 1000 * cpu / clips, "peak_mb": self._peak / 1e6}

    def _cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._family())

    def _family(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    def _sample(self) -> None:
        while True:
            total = 0
            for process in self._family():
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self._peak = max(self._peak, total)
            if self._ended.wait(0.5):
                return


def machine_facts(packages: Sequence[str]) -> dict[str, str | int | float]:
    """What a result depends on: processor, cores, memory, load at the start, versions."""
    facts: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "absent"
    return facts


def markdown(rows: Mapping[str, Mapping[str, float]], digits: int = 3) -> str:
    """A table with a row a variant."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [
        "| | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = (f"{row[column]:.{digits}g}" if column in row else "" for column in columns)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_results(
    folder: Path, name: str, facts: Mapping[str, object], tables: Mapping[str, Mapping[str, Figures]]
) -> None:
    """NAME.json and NAME.md in the folder; the tables also on stdout."""
    text = "\n\n".join(f"### {title}\n\n{markdown(rows)}" for title, rows in tables.items())
    described = ", ".join(f"{key} {value}" for key, value in facts.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"facts": facts, "tables": tables}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(f"{text}\n\n{described}\n")
    print(f"{text}\n\n{described}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
