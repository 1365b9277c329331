"""What a machine still has to tell MLflow: kept for one user and one site alone, and delivered wherever it was kept."""

import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.site import Site
from ray_jobs.run_records import deliver_waiting, spools
from shards.store import S3Access
from tavlad.runlog import RUN_TAG, RunSpec
from tavlad.spool import Spool
from tavlad.tracking import Tracker
from tests.mlflow_server import MlflowServer

SiteOf = Callable[[str, str], Site]


@pytest.fixture
def site_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteOf:
    """A site of this name and MLflow server, on a machine whose temporary folder is empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    access = S3Access(endpoint_url="http://127.0.0.1:9", access_key="", secret_key="")
    return lambda name, mlflow: Site(
        name=name, ray_address="auto", ray_dashboard="http://head:8265", s3=access, bucket="lab", mlflow_uri=mlflow
    )


def tell_nobody(folder: Path, experiment: str) -> None:
    """A run that was told while no server answered."""
    spec = RunSpec(experiment=experiment, name="train", tags={RUN_TAG: folder.parent.name}, params={})
    tracker = Tracker("http://127.0.0.1:9", spec, folder)
    tracker.log_metrics({"train/loss": 0.5}, 0)
    assert tracker.close(0.1) == 2


def test_spools_are_this_users_alone_and_a_sites_own(site_of: SiteOf, tmp_path: Path) -> None:
    lab = spools(site_of("lab", "http://lab"))
    assert lab == spools(site_of("sites/lab.toml", "http://lab"))
    assert lab != spools(site_of("other", "http://other")), "what waits for one server is not told to another"
    (private,) = tmp_path.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)
    spools(site_of("lab", "http://lab"))
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_another_made_in_its_place_is_not_used(site_of: SiteOf, tmp_path: Path) -> None:
    (tmp_path / "trap").mkdir()
    (tmp_path / f"tavlad-spool-{os.getuid()}").symlink_to(tmp_path / "trap")
    with pytest.raises(ValueError, match="is not a folder of yours: have it removed, or set TMPDIR"):
        spools(site_of("lab", "http://lab"))
    assert not list((tmp_path / "trap").iterdir())


def test_what_waits_in_the_folder_that_all_users_shared_is_delivered(
    site_of: SiteOf, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    former, experiment = tmp_path / "tavlad" / "spool", f"tavlad/{uuid.uuid4().hex[:8]}"
    lab = site_of("lab", mlflow_server.uri)
    for run in ("a-split1", "held-split1"):
        tell_nobody(former / run / "parent", experiment)
    holder = Spool(former / "held-split1" / "parent")
    assert deliver_waiting(lab) == {"a-split1/parent": 0}
    tell_nobody(spools(lab) / "held-split1" / "parent", experiment)
    holder.close()
    left = deliver_waiting(lab)
    assert sorted(name.partition(".")[0] for name in left) == ["a-split1/parent", "held-split1", "held-split1/parent"]
    assert set(left.values()) == {0}
    client = MlflowClient(mlflow_server.uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert {run.data.tags[RUN_TAG]: run.data.metrics for run in runs} == {
        run: {"train/loss": 0.5} for run in ("a-split1", "held-split1")
    }


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a folder to another user")
def test_what_another_user_left_there_is_left_to_them(site_of: SiteOf, tmp_path: Path) -> None:
    theirs = tmp_path / "tavlad" / "spool" / "theirs-split1"
    tell_nobody(theirs / "parent", "tavlad/theirs")
    os.chown(theirs, 12345, 12345)
    assert not list(spools(site_of("lab", "http://lab")).iterdir())
    assert theirs.is_dir()
