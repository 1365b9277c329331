"""Fixtures of every room. Shape annotations are checked at run time here, and only here."""

import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as infra/site.py has it; read when torch is imported

import jaxtyping
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

jaxtyping.install_import_hook(["tavlad", "shards"], "beartype.beartype")

# Each fixture is imported here or in one conftest alone: an import elsewhere would make it run once more.
from tests.fixtures_models import real_clips, small_model  # noqa: E402, F401
from tests.fixtures_services import local_s3, local_site  # noqa: E402, F401
from tests.fixtures_sets import packed, videos  # noqa: E402, F401
from tests.mlflow_server import mlflow_server  # noqa: E402, F401

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real videos, split files and images beside the checkout; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real videos of ../shared/data, which this machine does not have")
    return SHARED_DATA


_SERVED = ("fixtures_verbs", "local_site", "mlflow_server", "local_s3")
"""What a file names that uses servers, the slowest first: each is wanted once, not once a process of pytest."""


class _OneServerEach(LoadScopeScheduling):
    """Gives the files that use the same server to the same process, and any other file whole to either."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        used = next((name for name in _SERVED if name in _text_of(file)), file)
        return "local_site" if used == "fixtures_verbs" else used


@functools.cache
def _text_of(file: str) -> str:
    return (Path(__file__).parents[1] / file).read_text()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """How `make test` shares the tests among processes."""
    return _OneServerEach(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What kills, damages or rehearses is slow, whether it says so or not; the longest begins first; what needs a GPU
    is skipped without one."""
    has_gpu = torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_GPU") == "1"
    for item in items:
        if item.get_closest_marker("needs_gpu") is not None and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; FAIL_WITHOUT_GPU=1 makes that an error"))
        if item.get_closest_marker("chaos") is not None or item.get_closest_marker("long") is not None:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not any(name in _text_of(item.nodeid.partition("::")[0]) for name in _SERVED))
