"""Reading through a network that fails and a server that dies: late, but whole and right."""

import os
import signal
import threading
import time
import uuid
from collections.abc import Generator
from dataclasses import replace

import pytest

from infra import local
from shards import s3_store
from shards.read import ClipLoader, LoaderOptions
from shards.store import S3Access, Store, StoreUnreachable, open_store
from tests.fault_proxy import Fault, FaultProxy, fault_proxy
from tests.fixtures_services import temporary_home

DATA = bytes(range(256)) * 4000
URI = "s3://tavlad/test_faults"


@pytest.fixture(scope="module")
def proxy(local_s3: S3Access) -> Generator[FaultProxy]:
    open_store(URI, local_s3).write("data", DATA)
    with fault_proxy(local_s3.endpoint_url or "") as running:
        yield running


@pytest.mark.parametrize("fault", ["500", "503", "half a body", "no answer", "stall"])
def test_range_is_read_whole_in_spite_of_faults(
    local_s3: S3Access, proxy: FaultProxy, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_READ_TIMEOUT_S", 0.5)
    s3_store._client_of_process.cache_clear()
    s3_store._session_of_process.cache_clear()
    store = open_store(URI, replace(local_s3, endpoint_url=proxy.url))
    proxy.faults.extend([fault, fault])
    before = proxy.num_requests
    assert store.read_range("data", 1000, 500_000) == DATA[1000:501_000]
    assert proxy.num_requests == before + 3
    s3_store._client_of_process.cache_clear()
    s3_store._session_of_process.cache_clear()


def test_faults_of_all_kinds_in_a_row_are_outlasted(local_s3: S3Access, proxy: FaultProxy) -> None:
    store = open_store(URI, replace(local_s3, endpoint_url=proxy.url))
    proxy.faults.extend(["half a body", "503", "half a body", "no answer", "500"])
    assert store.read("data") == DATA


def test_network_that_never_mends_ends_in_one_sentence(
    local_s3: S3Access, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_PATIENCE_S", 1.0)
    store = open_store(URI, replace(local_s3, endpoint_url=proxy.url))
    proxy.faults.extend(["half a body"] * 100)
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match=f"{URI}/data"):
        store.read("data")
    assert 1 < time.monotonic() - began < 10
    assert 2 < 100 - len(proxy.faults) < 30
    proxy.faults.clear()


@pytest.fixture
def conflicting(local_s3: S3Access, proxy: FaultProxy) -> Store:
    """A store behind the proxy, whose next request is the write asked of it."""
    proxy.faults.clear()
    store = open_store(f"{URI}/{uuid.uuid4().hex}", replace(local_s3, endpoint_url=proxy.url))
    store.write("bucket was looked for", b"")
    return store


def test_conditional_write_that_met_another_is_tried_again(conflicting: Store, proxy: FaultProxy) -> None:
    proxy.faults.extend(["409", "409"])
    assert conflicting.write_if_absent("once", b"mine")
    assert conflicting.read("once") == b"mine"


def test_second_of_two_conditional_writes_at_once_learns_that_it_was_second(
    local_s3: S3Access, conflicting: Store, proxy: FaultProxy
) -> None:
    open_store(conflicting.uri, local_s3).write_if_absent("once", b"the other's")
    proxy.faults.append("409")
    assert not conflicting.write_if_absent("once", b"mine")
    assert conflicting.read("once") == b"the other's"


def test_conflict_that_never_ends_may_be_outlasted(
    conflicting: Store, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_store, "_PATIENCE_S", 0.5)
    proxy.faults.extend(["409"] * 100)
    with pytest.raises(StoreUnreachable, match=r"once now \(ConditionalRequestConflict.*try again later"):
        conflicting.write_if_absent("once", b"mine")
    assert 2 < 100 - len(proxy.faults) < 30
    proxy.faults.clear()
    assert not conflicting.exists("once")


@pytest.mark.chaos
def test_reading_outlives_a_server_killed_and_started_again(packed) -> None:
    options = LoaderOptions(batch_size=2, seed=0, crop=24, augment=True, shuffle=True, num_threads=3)
    with temporary_home():
        access = local.up(services=["s3"]).s3
        store = open_store("s3://tavlad/chaos", access)
        for path in packed.store.list():
            store.write(path, packed.store.read(path))

        kills: list[float] = []

        def kill_and_restart() -> None:
            for _ in range(3):
                time.sleep(0.7)
                pid = next(service.pid for service in local.status() if service.name == "s3")
                os.kill(pid or 0, signal.SIGKILL)
                kills.append(time.monotonic())
                time.sleep(1.0)
                assert local.up(services=["s3"]).s3 == access

        from_s3 = ClipLoader(packed.index, store, 1, "train", options)
        from_disk = ClipLoader(packed.index, packed.store, 1, "train", options)
        killer = threading.Thread(target=kill_and_restart)
        killer.start()
        epoch, read_after_last_kill = 0, 0
        while killer.is_alive() or read_after_last_kill < 3:
            expected = list(from_disk.epoch(epoch))
            read = list(from_s3.epoch(epoch))
            assert [batch.keys for batch in read] == [batch.keys for batch in expected]
            for one, other in zip(read, expected, strict=True):
                assert one.frames_BTCHW.equal(other.frames_BTCHW)
            epoch += 1
            read_after_last_kill += not killer.is_alive()
        assert len(kills) == 3
