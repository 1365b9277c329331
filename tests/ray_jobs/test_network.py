"""Which interface the ranks of a training talk over."""

import os
import sys
from pathlib import Path

import psutil
import pytest
import ray

from ray_jobs import network
from ray_jobs.network import interface_of
from tests.hosts import lan, why_not

_RANK = """
import os, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from ray_jobs.network import interface_of
os.environ["GLOO_SOCKET_IFNAME"] = interface_of(sys.argv[2])  # without it gloo tells the other host 127.0.0.1
url = "tcp://10.77.0.1:29500"
dist.init_process_group("gloo", init_method=url, rank=int(sys.argv[1]), world_size=2, timeout=timedelta(seconds=60))
ones = torch.ones(3)
dist.all_reduce(ones)
print(ones.tolist())
"""


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


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_ranks_on_two_hosts_find_each_other(tmp_path: Path) -> None:
    with lan(tmp_path) as hosts:
        logs = [tmp_path / "0.log", tmp_path / "1.log"]
        ranks = []
        for rank, log in enumerate(logs):
            host = hosts.add(f"host{rank}")
            ranks.append(host.start(sys.executable, "-c", _RANK, str(rank), hosts.address(host), log=log))
        assert [rank.wait(timeout=180) for rank in ranks] == [0, 0], [log.read_text() for log in logs]
        assert all("[2.0, 2.0, 2.0]" in log.read_text() for log in logs)
