"""The real servers as fixtures: an S3 server alone, and the whole embedded site. Both end with pytest, even killed."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from infra import local
from infra.site import Site, load_site
from shards.store import S3Access

# Read by Ray when it is imported, which some test modules do before any fixture runs; see infra/site.py.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

_END = """
import shutil, sys
sys.stdin.read()  # ends when pytest lets go of the other end, be it by dying
from infra import local, local_ray, site
local.down()
shutil.rmtree(local_ray.session_folder(site.state_folder()), ignore_errors=True)
shutil.rmtree(site.state_folder(), ignore_errors=True)
"""


@contextlib.contextmanager
def temporary_home() -> Generator[Path]:
    """A state folder for embedded services, set as TAVLAD_HOME; at the end they are ended and it is removed."""
    home = Path(tempfile.mkdtemp(prefix="tavlad-test-", dir="/tmp")).resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAVLAD_HOME", str(home))
        ender = subprocess.Popen(
            [sys.executable, "-c", _END], stdin=subprocess.PIPE, start_new_session=True, cwd=Path(__file__).parents[1]
        )
        assert ender.stdin is not None
        with ender.stdin:
            yield home
        assert ender.wait(timeout=120) == 0


@pytest.fixture(scope="session")
def local_s3() -> Generator[S3Access]:
    """A real S3 server with the bucket `tavlad`."""
    with temporary_home():
        access = local.up(services=["s3"]).s3
        with pytest.MonkeyPatch.context() as patch:  # other fixtures have homes of their own
            patch.delenv("TAVLAD_HOME")
            yield access


@pytest.fixture(scope="session")
def local_site() -> Generator[Site]:
    """The embedded site with all its services, also what `load_site()` finds while the tests run."""
    with temporary_home():
        local.up()
        yield load_site()
