"""The one way a verb reaches Ray."""

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import PlacementGroupID
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors, list_tasks
from ray.util.state.exception import RayStateApiException

from infra.site import Site, job_variables
from tavlad.errors import UserError

NODE_OUT_OF_MEMORY = (
    "a node ran out of memory, and Ray ended a process of this: lower training.batch_size or "
    "resources.prefetch_batches, reserve memory for a worker (resources.memory_per_worker, GB), or use larger nodes"
)
# In the messages of a torch that is refused memory; verbs that need no torch import this module too.
_REFUSED_BY_GPU, _REFUSED_BY_MACHINE = "CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"
_SECONDS_BETWEEN_LOOKS = 10.0
_SECONDS_BETWEEN_LINES = 30.0
_MOST_ENTRIES = 10_000  # as many as Ray tells of
_UNITS = {"memory": (1e9, "GB of memory")}
_FIELDS = {
    "CPU": "resources.cpus_per_worker or resources.workers",
    "GPU": "resources.gpus_per_worker or resources.workers",
    "memory": "resources.memory_per_worker or resources.workers",
}

Resources = Mapping[str, float]
"""Amounts by Ray's names: "CPU", "GPU", "memory" (bytes)."""


def connect(site: Site, say: Callable[[str], None] | None = None) -> None:
    """Connect this process to the site's cluster, once; workers find the site by its name.

    From then on `say` is told every half minute what this process waits for while the cluster has no room for it.
    """
    if ray.is_initialized():
        return
    # Ray refuses a variable that the submitted job's own runtime environment has set already.
    variables = {name: value for name, value in site.worker_environment().items() if name not in job_variables()}
    runtime_env: dict[str, Any] = {"env_vars": variables}
    ends = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=site.ray_address,
            runtime_env=runtime_env,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
        )
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at {site.ray_address} (site {site.name}): start it, or correct ray_address"
        ) from error
    if callable(ends) and threading.current_thread() is threading.main_thread():
        # Ray put its own handler in the place of ours, which lets a verb end well.
        signal.signal(signal.SIGTERM, ends)
    if say is not None:
        threading.Thread(target=_tell_of_waiting, args=(say,), name="waiting", daemon=True).start()


def require_room(site: Site, asked: Resources, fields: Mapping[str, str] = _FIELDS) -> None:
    """UserError for what the embedded site, which is one machine, can never give; any other may get more nodes.

    `fields` says what is to be lowered.
    """
    if site.state is None:
        return
    have = ray.cluster_resources()
    for name, amount in asked.items():
        if amount > have.get(name, 0) + 1e-6:
            raise UserError(
                f"{_amount(name, amount)} asked for, and this machine, all that site {site.name} has, has "
                f"{_amount(name, have.get(name, 0))}: lower {fields[name]}, or choose a --site that has more"
            )


def _tell_of_waiting(say: Callable[[str], None]) -> None:
    began = told = 0.0
    is_waiting = False
    while True:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if not ray.is_initialized():
            return
        try:
            asked, have, free = _waited_for(), ray.cluster_resources(), ray.available_resources()
        except (RayStateApiException, ConnectionError):  # Ray's dashboard is busy
            continue
        now = time.monotonic()
        if asked and not is_waiting:
            began = told = now
        is_waiting = bool(asked)
        if asked and now - told >= _SECONDS_BETWEEN_LINES:
            told = now
            amounts = [
                f"{_amount(name, amount)} asked for, {_number(name, free.get(name, 0))} of "
                f"{_number(name, have.get(name, 0))} free"
                for name, amount in asked.items()
            ]
            say(f"  waiting for room on the cluster, {now - began:.0f} s by now: {'; '.join(amounts)}")


def _waited_for() -> dict[str, float]:
    """What this driver's job asks for and has not got, if nothing of it computes; empty where it waits for nothing."""
    of_this_job = ("job_id", "=", ray.get_runtime_context().get_job_id())

    def tasks(state: str) -> list[dict[str, float]]:
        found: list[Any] = list_tasks(
            filters=[of_this_job, ("state", "=", state)],
            detail=True,
            limit=_MOST_ENTRIES,
            raise_on_missing_output=False,
        )
        return [each.required_resources or {} for each in found]

    actors: list[Any] = list_actors(
        filters=[of_this_job, ("state", "=", "ALIVE")], detail=True, limit=_MOST_ENTRIES, raise_on_missing_output=False
    )
    groups = list(placement_groups().values())
    holding = [*tasks("RUNNING"), *(each.required_resources or {} for each in actors)]
    holding += [_sum_of(group) for group in groups if group["state"] == "CREATED"]
    if any(_computes(each) for each in holding):
        return {}
    waiting = [_sum_of(group) for group in groups if group["state"] != "CREATED"] + tasks("PENDING_NODE_ASSIGNMENT")
    return next((each for each in waiting if _computes(each)), {})


def _sum_of(group: dict[str, Any]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for bundle in group["bundles"].values():
        total.update(bundle)
    return dict(total)


def _computes(resources: Resources) -> bool:
    return resources.get("CPU", 0) > 0 or resources.get("GPU", 0) > 0


def _amount(name: str, amount: float) -> str:
    return f"{_number(name, amount)} {_UNITS[name][1] if name in _UNITS else name}"


def _number(name: str, amount: float) -> str:
    return f"{amount / _UNITS[name][0] if name in _UNITS else amount:g}"


def on_this_node() -> dict[str, Any]:
    """Options of an actor that must live as long as this process: beside it, where no other node's end reaches it."""
    here = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def num_cpus() -> int:
    """CPUs of the whole cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def room_for(cpus: float, gpus: float) -> int:
    """How many of something that needs so many CPUs and GPUs the whole cluster could hold at a time; at least 1."""
    have = ray.cluster_resources()
    room = have.get("CPU", 1) / max(cpus, 0.01)
    if gpus:
        room = min(room, have.get("GPU", 0) / gpus)
    return max(1, int(room))


def num_cpus_of_a_node() -> int:
    """CPUs of the smallest node that has any: a task that asks for more might never find a place."""
    counts = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return min((count for count in counts if count > 0), default=1)


def placement_groups() -> dict[str, dict[str, Any]]:
    """What Ray tells of the placement groups of this driver's job that hold resources or wait for them, by ID."""
    job = ray.get_runtime_context().get_job_id()
    groups: dict[str, dict[str, Any]] = placement_group_table()
    return {key: group for key, group in groups.items() if key.endswith(job) and group["state"] != "REMOVED"}


def release(key: str) -> None:
    """Remove a placement group: what it holds is free again, and actors in it end."""
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(key))))


def result_of(reference: Any) -> Any:
    """What a task returns; a mistake of the user is raised as the task raised it, without the task's traceback."""
    try:
        return ray.get(reference)
    except OutOfMemoryError as error:
        raise UserError(NODE_OUT_OF_MEMORY) from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        if (text := lack_of_memory(error.cause)) is not None:
            raise UserError(text) from error
        raise


def lack_of_memory(error: BaseException) -> str | None:
    """What to do about an error that means that a process was refused memory; None if it means something else."""
    if isinstance(error, RuntimeError) and _REFUSED_BY_GPU in str(error):
        return "the GPU's memory is too small for this: lower training.batch_size, or use more workers"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _REFUSED_BY_MACHINE in str(error)):
        return "the machine's memory is too small for this: lower training.batch_size or the model's sizes"
    return None
