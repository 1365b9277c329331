"""Fixtures of every room. Shape annotations are checked at run time here, and only here."""

import os
from pathlib import Path

import jaxtyping
import pytest
import torch

jaxtyping.install_import_hook(["tavlad", "shards"], "beartype.beartype")

from tests.fixtures_services import local_s3, local_site  # noqa: E402, F401

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real videos, split files and images beside the checkout; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the real videos of ../shared/data, which this machine does not have")
    return SHARED_DATA


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What kills and damages is slow, whether it says so or not; what needs a GPU is skipped without one."""
    has_gpu = torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_GPU") == "1"
    for item in items:
        if item.get_closest_marker("needs_gpu") is not None and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; FAIL_WITHOUT_GPU=1 makes that an error"))
        if item.get_closest_marker("chaos") is not None:
            item.add_marker(pytest.mark.slow)
