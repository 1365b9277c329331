"""Which interface the ranks of a training talk over."""

import os

import psutil
import pytest
import ray

from ray_jobs import network
from ray_jobs.network import interface_of


def test_interface_is_the_one_that_has_the_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    for name, addresses in psutil.net_if_addrs().items():
        assert all(interface_of(each.address) == name for each in addresses if each.family.name == "AF_INET")
    assert interface_of("192.0.2.1") is None


def test_what_the_node_sets_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "fast0")
    network._choose_interface()
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "fast0")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
