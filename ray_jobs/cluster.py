"""The one way a verb reaches Ray."""

import logging
from typing import Any

import ray
from ray import PlacementGroupID
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.site import Site, job_variables
from tavlad.errors import UserError

NODE_OUT_OF_MEMORY = (
    "a node ran out of memory, and Ray ended a process of this: lower training.batch_size or "
    "resources.prefetch_batches, reserve memory for a worker (resources.memory_per_worker, GB), or use larger nodes"
)
# In the messages of a torch that is refused memory; verbs that need no torch import this module too.
_REFUSED_BY_GPU, _REFUSED_BY_MACHINE = "CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"


def connect(site: Site) -> None:
    """Connect this process to the site's cluster, once; workers find the site by its name."""
    if ray.is_initialized():
        return
    # Ray refuses a variable that the submitted job's own runtime environment has set already.
    variables = {name: value for name, value in site.worker_environment().items() if name not in job_variables()}
    runtime_env: dict[str, Any] = {"env_vars": variables}
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
        if isinstance(error.cause, ValueError):
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
