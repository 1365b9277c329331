"""tavlad site check: everything a run needs of a site, tried from here and, by a small job, from the cluster."""

import dataclasses
import importlib.metadata
import json
import platform
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

from infra.site import Site, load_site
from infra.site_check import MAX_SKEW_S, Finding, check_clocks, check_mlflow, check_s3
from ray_jobs.recipe import ResourceConfig
from shards.scratch import scratch
from tavlad.errors import UserError

_PROBE_S = 180.0
_MARK = "tavlad-site-probe:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Versions:
    """What must be equal on both sides of a submission: Ray refuses other Pythons, MLflow other schemas."""

    python: str
    ray: str

    @classmethod
    def here(cls) -> "Versions":
        """Those of this process."""
        return cls(python=platform.python_version(), ray=importlib.metadata.version("ray"))


def check_site(
    site: Site, resources: ResourceConfig | None = None, ours: Versions | None = None, *, probe: bool = True
) -> list[Finding]:
    """Every check in the order in which failures should be mended; one that would only repeat another is left out.

    `resources`: what a recipe asks for, counted against the cluster. `probe` off leaves out the job.
    """
    ours = ours or Versions.here()
    findings = check_s3(site) + check_mlflow(site, importlib.metadata.version("mlflow")) + check_clocks(site)
    ray_findings = _check_ray(site, resources, ours)
    findings += ray_findings
    if probe and all(finding.fine for finding in ray_findings):
        findings += _check_from_the_cluster(site, ours)
    return findings


def _check_ray(site: Site, resources: ResourceConfig | None, ours: Versions) -> list[Finding]:
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    from ray_jobs.submit import jobs_of

    what = "Ray jobs API"
    try:
        client = jobs_of(site)
        client.list_jobs()  # needs the token, where there is one
        listed: list[Any] = list_nodes(address=site.ray_dashboard, detail=True)
        nodes = [node for node in listed if node.state == "ALIVE"]
    except (UserError, RuntimeError, RayStateApiException) as error:
        remedy = (
            str(error)
            if isinstance(error, UserError)
            else "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file of the cluster's token"
        )
        return [Finding(what=what, fine=False, found=str(error).strip().splitlines()[0], remedy=remedy)]
    findings = [Finding(what=what, fine=True, found=f"{site.ray_dashboard}, {len(nodes)} nodes")]
    findings.append(_equal("Ray version", _server_version(client), ours.ray, "ray=="))
    if resources is not None:
        findings += _check_resources(nodes, resources)
    return findings


def _server_version(client: Any) -> str:
    return str(client._server_ray_version)


def _equal(what: str, theirs: str, ours: str, package: str) -> Finding:
    fine = theirs == ours
    found = f"{theirs} on the cluster, {ours} here"
    remedy = "" if fine else f"make them equal: {package}{theirs} here, or the image of this version there"
    return Finding(what=what, fine=fine, found=found, remedy=remedy)


def _check_resources(nodes: list[Any], resources: ResourceConfig) -> list[Finding]:
    """GPUs and CPUs of the nodes that are there, against those a training reserves."""
    findings: list[Finding] = []
    for name, each in (("GPU", resources.gpus_per_worker), ("CPU", resources.cpus_per_worker)):
        counts = [float((node.resources_total or {}).get(name, 0)) for node in nodes]
        # A worker is on one node; how many fit is what counts, not the sum.
        places = sum(int(count // each) for count in counts) if each else resources.most_workers
        fine = places >= resources.fewest_workers
        findings.append(
            Finding(
                what=f"{name}s for the recipe",
                fine=fine,
                found=f"{sum(counts):g} on {len(nodes)} nodes, room for {places} of {resources.workers} workers",
                remedy=""
                if fine
                else f"lower resources.workers or resources.{name.lower()}s_per_worker, or add nodes (a cluster that "
                "grows by itself does so when the training waits: then leave --recipe out)",
            )
        )
    return findings


def _check_from_the_cluster(site: Site, ours: Versions) -> list[Finding]:
    """What a job on the cluster finds: its Python, its keys, its way to S3 and MLflow, its clock."""
    what = "a job"
    try:
        report = _run_probe(site)
    except (UserError, RuntimeError) as error:
        remedy = "look at it in Ray's dashboard: the nodes must have tavlad's dependencies (infra/Dockerfile)"
        return [Finding(what=what, fine=False, found=str(error), remedy=remedy)]
    findings = [Finding(what=what, fine=True, found="started, ran and answered")]
    findings.append(_equal("Python version", report["python"], ours.python, "Python "))
    skew = report["skew"]
    findings.append(
        Finding(
            what="clock of Ray",
            fine=skew <= MAX_SKEW_S,
            found=f"at least {skew:.0f} s from this one",
            remedy="" if skew <= MAX_SKEW_S else "let NTP set the clocks of the nodes",
        )
    )
    for row in report["findings"]:
        finding = Finding(**row)
        findings.append(dataclasses.replace(finding, what=f"{finding.what}, from the cluster"))
    return findings


def _run_probe(site: Site) -> dict[str, Any]:
    from ray_jobs.job_parcel import Parcel, fill_working_folder
    from ray_jobs.submit import jobs_of

    client, job = jobs_of(site), f"tavlad-probe-{uuid.uuid4().hex[:12]}"
    parcel = Parcel(verb="probe", arguments=(), inputs={}, name=job)
    began = time.time()
    with scratch() as folder:
        fill_working_folder(parcel, folder)
        client.submit_job(
            entrypoint=f"python -m ray_jobs.site_check {site.name}",
            submission_id=job,
            runtime_env={"working_dir": folder, "env_vars": site.worker_environment()},
        )
    while not client.get_job_status(job).is_terminal():
        if time.time() - began > _PROBE_S:
            client.stop_job(job)
            raise UserError(f"{job} did not end in {_PROBE_S:.0f} s")
        time.sleep(0.25)
    ended, text = time.time(), client.get_job_logs(job)
    answers = [line.removeprefix(_MARK) for line in text.splitlines() if line.startswith(_MARK)]
    if not answers:
        lines = [line for line in text.strip().splitlines() if line.strip()]
        raise UserError(f"{job} failed: {lines[-1] if lines else client.get_job_info(job).message}")
    report = json.loads(answers[-1])
    # The job said its time at some moment between: only what lies outside is surely skew.
    report["skew"] = max(0.0, began - report["time"], report["time"] - ended)
    return report


def _probe(site_name: str) -> None:
    """Run by the job: says what it finds as one marked line."""
    try:
        site = load_site(site_name)
        findings = check_s3(site) + check_mlflow(site, importlib.metadata.version("mlflow"))
    except UserError as error:
        remedy = "give the nodes their S3 keys: s3_keys of the site (docs/DEPLOY.md)"
        findings = [Finding(what="the site's settings", fine=False, found=str(error), remedy=remedy)]
    report = {
        "python": platform.python_version(),
        "time": time.time(),
        "findings": [dataclasses.asdict(each) for each in findings],
    }
    print(_MARK + json.dumps(report), flush=True)  # noqa: T201


if __name__ == "__main__":
    _probe(sys.argv[1])
