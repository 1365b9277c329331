"""`tavlad site check` finds what is planted: one fault a test, against the real servers."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

from infra import site_check
from infra.site import Site, load_site
from infra.site_check import Finding, check_clocks, check_mlflow, check_s3
from ray_jobs.recipe import ResourceConfig
from ray_jobs.site_check import Versions, check_site
from shards.store import Store, open_store
from tests.fixtures_verbs import Said, tavlad

pytestmark = pytest.mark.slow


@pytest.fixture
def site(lab: Path) -> Site:
    return load_site(str(lab))


def failed(findings: list[Finding]) -> Finding:
    """The one thing that is not fine; everything says what it found, and every failure what to do."""
    assert all(each.found for each in findings)
    (finding,) = [each for each in findings if not each.fine]
    assert finding.remedy
    return finding


def test_good_site_passes_also_from_the_cluster(site: Site) -> None:
    findings = check_site(site, ResourceConfig(workers=1))
    assert all(each.fine for each in findings), findings
    names = {each.what for each in findings}
    assert {"S3 conditional put", "MLflow", "clock of MLflow", "Ray version", "Python version", "a job"} <= names
    assert {"S3 read, from the cluster", "MLflow, from the cluster", "CPUs for the recipe"} <= names


def s3(site: Site, **changes: str) -> Site:
    return dataclasses.replace(site, s3=dataclasses.replace(site.s3, **changes))


def test_fault_1_wrong_secret_key(site: Site) -> None:
    finding = failed(check_s3(s3(site, secret_key="a-secret-that-is-wrong")))
    assert (finding.what, "refused access" in finding.found) == ("S3 bucket", True)
    assert "right keys" in finding.remedy
    assert "a-secret-that-is-wrong" not in str(finding)


def test_fault_2_unknown_access_key(site: Site) -> None:
    assert "right keys" in failed(check_s3(s3(site, access_key="nobody"))).remedy


def test_fault_3_missing_bucket(site: Site) -> None:
    finding = failed(check_s3(dataclasses.replace(site, bucket="no-such-bucket")))
    assert "create bucket no-such-bucket" in finding.remedy


def test_fault_4_no_s3_server(site: Site) -> None:
    finding = failed(check_s3(s3(site, endpoint_url="http://127.0.0.1:9")))
    assert "correct s3_endpoint" in finding.remedy


def test_fault_5_no_mlflow_server(site: Site) -> None:
    finding = failed(check_mlflow(dataclasses.replace(site, mlflow_uri="http://127.0.0.1:9"), "3.17.2"))
    assert "start MLflow" in finding.remedy


def test_fault_6_another_server_in_mlflows_place(site: Site) -> None:
    wrong = dataclasses.replace(site, mlflow_uri=str(site.s3.endpoint_url))
    assert "MLflow's own address" in failed(check_mlflow(wrong, "3.17.2")).remedy


def test_fault_7_mlflow_of_another_version(site: Site) -> None:
    assert "run MLflow 2.9.0 there" in failed(check_mlflow(site, "2.9.0")).remedy


def test_fault_8_clock_skew(site: Site) -> None:
    findings = check_clocks(site, now=lambda: time.time() + 3600)
    assert findings
    assert all(not each.fine and "36" in each.found and "NTP" in each.remedy for each in findings)
    assert all(each.fine for each in check_clocks(site))


def test_fault_9_no_ray_cluster(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    finding = failed(check_site(dataclasses.replace(site, ray_dashboard="http://127.0.0.1:9"), probe=False))
    assert (finding.what, "check ray_dashboard" in finding.remedy) == ("Ray jobs API", True)


def test_fault_10_wrong_token(lab: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 64)
    said = run_check(lab, RAY_AUTH_TOKEN_PATH=str(token))
    assert said.code == 2
    assert "refuses the Ray token" in said.err
    (finding,) = [each for each in json.loads(said.out.splitlines()[-1])["checks"] if not each["fine"]]
    assert finding["what"] == "Ray jobs API"


def test_fault_11_ray_of_another_version(site: Site) -> None:
    ours = dataclasses.replace(Versions.here(), ray="2.59.0")
    finding = failed(check_site(site, ours=ours, probe=False))
    assert (finding.what, "make them equal" in finding.remedy) == ("Ray version", True)


def test_fault_12_fewer_gpus_than_the_recipe_wants(site: Site) -> None:
    finding = failed(check_site(site, ResourceConfig(workers=2, gpus_per_worker=64.0), probe=False))
    assert (finding.what, "lower resources.workers" in finding.remedy) == ("GPUs for the recipe", True)


def test_fault_13_server_that_ignores_conditions(site: Site) -> None:
    class Forgetful:
        """A bucket's store whose server overwrites whatever the condition says."""

        def __init__(self, store: Store) -> None:
            self._store = store

        def write_if_absent(self, path: str, data: bytes) -> bool:
            self._store.write(path, data)
            return True

    store = open_store(f"s3://{site.bucket}/site-check-test", site.s3)
    assert "both win" in str(site_check._conditional_put(Forgetful(store), "object"))  # type: ignore[arg-type]
    store.delete("object")


def test_fault_14_keys_that_only_the_nodes_lack(site: Site) -> None:
    unknown = dataclasses.replace(site, s3_keys="/no/such/keys")
    findings = check_site(unknown)
    assert failed(findings).what == "the site's settings, from the cluster"


def run_check(lab: Path, **environment: str) -> Said:
    return tavlad("--json", "site", "check", str(lab), **environment)
