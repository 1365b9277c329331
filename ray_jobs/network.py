"""The network interface over which the ranks of a training talk: the one that Ray knows their node by."""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend  # pyright: ignore[reportPrivateUsage]
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass
class HostNetwork(TorchConfig):
    """Ray Train's settings for torch, with the right interface chosen on each host.

    Left alone gloo takes the address that the host's own name resolves to, which on many machines is loopback, and NCCL
    the first interface that is none; both fail across hosts, or go the slow way. A variable that the node sets stays.
    """

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        try:
            worker_group.execute(_choose_interface)
            super().on_start(worker_group, backend_config)
        except (RayActorError, RayTaskError) as error:
            # A worker died just now. Ray takes the group for started, and would leave it its place for ever; and it
            # would end the training where it hears first of a peer whose connection broke.
            worker_group._clear_state()  # pyright: ignore[reportPrivateUsage]
            raise WorkerGroupStartupFailedError(str(error)) from error


def _choose_interface() -> None:
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable in _VARIABLES:
            os.environ.setdefault(variable, name)


def interface_of(address: str) -> str | None:
    """The name of the interface that has this address; None where it has none, as behind address translation."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.family in (socket.AF_INET, socket.AF_INET6) and each.address == address for each in addresses):
            return name
    return None
