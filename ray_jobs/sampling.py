"""Each machine of a training tells how busy it is while its ranks train, under the names that MLflow draws.

MLflow's own monitors are not used: to import them takes seconds of every worker's start, and they leave GPUs out where
the package nvidia-ml-py is missing, of which Ray carries a copy.
"""

import contextlib
import os
import threading
from typing import Any

import psutil
from ray._private.thirdparty import pynvml

from ray_jobs.monitor import Monitor, Sampled

_SECONDS_BETWEEN_SAMPLES = 10.0
_SECONDS_FOR_THE_LAST = 5.0
_nvml: Any = pynvml  # has no types


class Sampler:
    """Samples this machine until it is closed, and once more then: a short training has one point of each curve."""

    def __init__(self, monitor: Monitor, node: int, stage: int) -> None:
        """`node` is the machine's rank: it keeps its curves when another machine takes its place."""
        self.stage = stage
        """The stage that is trained now, whose run the samples belong to."""
        self._monitor = monitor
        self._prefix = f"node{node}"
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The last sample, told."""
        self._ends.set()
        self._thread.join(_SECONDS_FOR_THE_LAST)

    def _run(self) -> None:
        machine, is_last = Machine(), False
        while not is_last:
            is_last = self._ends.wait(_SECONDS_BETWEEN_SAMPLES)
            values = {f"{self._prefix}/{name}": value for name, value in machine.sample().items()}
            (self._monitor.tell_surely if is_last else self._monitor.tell)(Sampled(stage=self.stage, values=values))


class Machine:
    """Its processors, memory, disk and network since it was made, and its GPUs."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # which counts from one call to the next
        self._network = psutil.net_io_counters()
        self._gpus: list[Any] = []
        with contextlib.suppress(_nvml.NVMLError):  # no NVIDIA GPU here
            _nvml.nvmlInit()
            self._gpus = [_nvml.nvmlDeviceGetHandleByIndex(number) for number in range(_nvml.nvmlDeviceGetCount())]

    def sample(self) -> dict[str, float]:
        """Such as `cpu_utilization_percentage`, `gpu_0_memory_usage_megabytes`."""
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
            "network_receive_megabytes": (network.bytes_recv - self._network.bytes_recv) / 1e6,
            "network_transmit_megabytes": (network.bytes_sent - self._network.bytes_sent) / 1e6,
        }
        for number, gpu in enumerate(self._gpus):
            values |= {f"gpu_{number}_{name}": value for name, value in _sample_gpu(gpu).items()}
        return values


def _sample_gpu(gpu: Any) -> dict[str, float]:
    """What the GPU tells; some do not tell all."""
    values: dict[str, float] = {}
    with contextlib.suppress(_nvml.NVMLError):
        memory = _nvml.nvmlDeviceGetMemoryInfo(gpu)
        values["memory_usage_percentage"] = memory.used / memory.total * 100
        values["memory_usage_megabytes"] = memory.used / 1e6
    with contextlib.suppress(_nvml.NVMLError):
        values["utilization_percentage"] = _nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
    with contextlib.suppress(_nvml.NVMLError):
        watts = _nvml.nvmlDeviceGetPowerUsage(gpu) / 1000
        values["power_usage_watts"] = watts
        values["power_usage_percentage"] = watts / (_nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000) * 100
    return values
