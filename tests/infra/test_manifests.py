"""What is deployed, checked against the schemas of those who read it, and against our own rules of safety."""

import copy
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from ray_jobs.job_parcel import SUBMITTED

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
CRDS = ROOT.parent / "shared" / "schemas" / "kuberay"
_KUBERNETES_VERSION = "1.34"
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|STORE_URI")

Manifest = dict[str, Any]


def manifests(*folders: Path) -> list[Manifest]:
    paths = sorted(path for folder in folders for path in folder.glob("*.yaml"))
    documents = [document for path in paths for document in yaml.safe_load_all(path.read_text())]
    return [document for document in documents if document["kind"] != "Kustomization"]


KUBERNETES = manifests(INFRA / "kuberay" / "base", INFRA / "kuberay" / "jobs" / "base")


def pods(node: Any) -> Iterator[Manifest]:
    """Every pod's spec below a manifest."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


def strict(schema: Any) -> Any:
    """The schema of a custom resource, refusing the fields that Kubernetes would drop in silence."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    is_closed = schema.get("type") == "object" and isinstance(schema.get("properties"), dict)
    if is_closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """The published schema of each of KubeRay's kinds."""
    if not CRDS.is_dir():
        pytest.skip("needs KubeRay's schemas in ../shared/schemas, which this machine does not have")
    found: dict[str, Any] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for kind, file in (("RayCluster", "ray.io_rayclusters.yaml"), ("RayJob", "ray.io_rayjobs.yaml")):
        definition = yaml.load((CRDS / file).read_text(), loader)
        (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"].pop("additionalProperties", None)
        found[kind] = schema
    return found


def errors(schema: Any, manifest: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(manifest)]


@pytest.mark.parametrize("manifest", KUBERNETES, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_manifest_fits_its_schema(request: pytest.FixtureRequest, manifest: Manifest) -> None:
    if manifest["apiVersion"].startswith("ray.io/"):
        assert errors(request.getfixturevalue("schemas")[manifest["kind"]], manifest) == []
    else:
        kubernetes_validate.validate(manifest, _KUBERNETES_VERSION, strict=True)


def test_misspelt_fields_of_kubernetes_would_be_found() -> None:
    (mlflow,) = [copy.deepcopy(each) for each in KUBERNETES if each["kind"] == "Deployment"]
    mlflow["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(mlflow, _KUBERNETES_VERSION, strict=True)


def test_misspelt_fields_would_be_found(schemas: dict[str, Any]) -> None:
    (cluster,) = [copy.deepcopy(each) for each in KUBERNETES if each["kind"] == "RayCluster"]
    cluster["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limit"] = {}
    cluster["spec"]["authOptions"]["mode"] = "tokens"
    assert len(errors(schemas["RayCluster"], cluster)) == 3


@pytest.mark.parametrize("manifest", KUBERNETES, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_every_container_is_bounded_unprivileged_and_pinned(manifest: Manifest) -> None:
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert re.fullmatch(r"tavlad|\w+:\d[\w.-]*", container["image"]), "ours is named by kustomize"


def test_secrets_are_references_and_nowhere_values() -> None:
    assert not [each for each in KUBERNETES if each["kind"] == "Secret"]
    referred: set[str] = set()
    for manifest in KUBERNETES:
        for pod in pods(manifest):
            for container in pod["containers"]:
                for variable in container.get("env", []):
                    if SECRET.search(variable["name"]):
                        referred.add(variable["valueFrom"]["secretKeyRef"]["name"])
                referred |= {each["secretRef"]["name"] for each in container.get("envFrom", []) if "secretRef" in each}
    (cluster,) = [each for each in KUBERNETES if each["kind"] == "RayCluster"]
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    (settings,) = [each for each in KUBERNETES if each["kind"] == "ConfigMap"]
    assert not [name for name in settings["data"] if SECRET.search(name)]
    documented = (ROOT / "docs" / "DEPLOY.md").read_text()
    for name in referred | {"ray-token"}:
        assert f"create secret generic {name}" in documented, f"DEPLOY.md does not say how {name} is made"


def test_secret_that_a_role_replaces_may_be_absent() -> None:
    """DEPLOY.md leaves `s3-keys` out where the cloud gives the service account a role; pods must start all the same."""
    references: list[Manifest] = []
    for container in (each for manifest in KUBERNETES for pod in pods(manifest) for each in pod["containers"]):
        references += [each["secretRef"] for each in container.get("envFrom", []) if "secretRef" in each]
        sources = [each["valueFrom"] for each in container.get("env", []) if "valueFrom" in each]
        references += [each["secretKeyRef"] for each in sources if "secretKeyRef" in each]
    optional = {name: {each.get("optional", False) for each in references if each["name"] == name} for name in SECRETS}
    assert optional == {"s3-keys": {True}, "ray-token": {False}, "mlflow-database": {False}}


SECRETS = ("s3-keys", "ray-token", "mlflow-database")


def refused_by_operator(spec: Manifest) -> list[str]:
    """What KubeRay's operator refuses of a RayJob beyond its schema (ValidateRayJobSpec): the job would never start."""
    refused: list[str] = []
    if spec.get("clusterSelector"):
        refused += ["no cluster is named"] * (not spec["clusterSelector"].get("ray.io/cluster"))
        refused += ["backoffLimit beside clusterSelector"] * (spec.get("backoffLimit", 0) > 0)
        refused += ["suspend beside clusterSelector"] * spec.get("suspend", False)
        refused += ["SidecarMode beside clusterSelector"] * (spec.get("submissionMode") == "SidecarMode")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        refused += ["ttlSecondsAfterFinished without shutdownAfterJobFinishes"]
    return refused


def test_operator_accepts_our_jobs() -> None:
    (job,) = [each for each in KUBERNETES if each["kind"] == "RayJob"]
    assert refused_by_operator(job["spec"]) == []
    (cluster,) = [each for each in KUBERNETES if each["kind"] == "RayCluster"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["spec"]["submitterConfig"]["backoffLimit"] > 0, "a submitter that was lost is started again"
    changes = {"backoffLimit": 1, "suspend": True, "submissionMode": "SidecarMode", "ttlSecondsAfterFinished": 60}
    assert len(refused_by_operator(job["spec"] | changes)) == 4


def test_network_is_closed_but_for_what_is_named() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in KUBERNETES if each["kind"] == "NetworkPolicy"}
    assert policies["nothing-comes-in"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule.get("from"), f"{name} lets everybody in"
    labels = {label for each in KUBERNETES for label in yaml_labels(each)} | {("ray.io/is-ray-node", "yes")}
    for name, policy in policies.items():
        for pair in policy["podSelector"].get("matchLabels", {}).items():
            assert pair in labels, f"{name} selects {pair}, which no pod has"


def yaml_labels(node: Any) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        yield from node.get("labels", {}).items()
        for value in node.values():
            yield from yaml_labels(value)
    elif isinstance(node, list):
        for value in node:
            yield from yaml_labels(value)


def job_entrypoints() -> dict[str, str]:
    jobs = INFRA / "kuberay" / "jobs"
    files = {path.parent.name: yaml.safe_load(path.read_text()) for path in jobs.glob("*/kustomization.yaml")}
    del files["base"]
    return {verb: yaml.safe_load(file["patches"][0]["patch"])[0]["value"] for verb, file in files.items()}


def test_every_verb_of_a_cluster_has_its_job() -> None:
    entrypoints = job_entrypoints()
    assert entrypoints.keys() == SUBMITTED
    for verb, entrypoint in entrypoints.items():
        assert entrypoint.split()[:2] == ["tavlad", verb]


@pytest.mark.parametrize(("verb", "entrypoint"), sorted(job_entrypoints().items()))
def test_entrypoint_of_a_job_is_a_command_that_parses(verb: str, entrypoint: str) -> None:
    import typer.main

    from ray_jobs.cli import app

    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    command.make_context(verb, entrypoint.split()[2:], resilient_parsing=False)


def test_kustomize_renders_every_folder(schemas: dict[str, Any]) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl, which this machine does not have")
    for folder in [INFRA / "kuberay" / "base", *(INFRA / "kuberay" / "jobs" / verb for verb in job_entrypoints())]:
        done = subprocess.run(
            ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60
        )
        for document in yaml.safe_load_all(done.stdout):
            assert document["metadata"].get("namespace", "tavlad") == "tavlad"
            if document["kind"] in schemas:
                assert errors(schemas[document["kind"]], document) == []
            for pod in pods(document):
                assert all(re.search(r":\d[\w.-]*$", container["image"]) for container in pod["containers"])


def launcher() -> Manifest:
    return yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())


def test_launcher_file_passes_rays_own_validator() -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher()))
    wrong = launcher()
    wrong["available_node_types"]["gpu-spot"]["max_worker"] = 1
    with pytest.raises(ValidationError, match="max_worker"):
        validate_config(prepare_config(wrong))


def test_launcher_opens_nothing_and_carries_no_key() -> None:
    config = launcher()
    (rule,) = config["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert all(each["CidrIp"].startswith("10.") for each in rule["IpRanges"])
    assert not re.search(r"AKIA|SECRET_KEY|RAY_AUTH_TOKEN=", (INFRA / "aws" / "cluster.yaml").read_text())
    for node in config["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    assert "--env TAVLAD_S3_KEYS=role" in options


def tool(name: str) -> str:
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        pytest.skip(f"needs {name}, which has no package for this machine")
    return str(path)


def passes(*command: str) -> tuple[bool, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode == 0, done.stdout + done.stderr


def test_cloudformation_passes_cfn_lint(tmp_path: Path) -> None:
    template = INFRA / "aws" / "storage.yaml"
    fine, said = passes(tool("cfn-lint"), str(template))
    assert fine, said
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(template.read_text().replace("AbortIncompleteMultipartUpload", "AbortIncompleteUpload"))
    assert not passes(tool("cfn-lint"), str(wrong))[0]


def test_rights_of_the_machines_are_the_least() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, tag, node: f"!{tag} {node.value}")
    resources = yaml.load((INFRA / "aws" / "storage.yaml").read_text(), Loader)["Resources"]
    statements = resources["UseBucket"]["Properties"]["PolicyDocument"]["Statement"]
    statements += resources["HeadRole"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
    for statement in statements:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not [action for action in actions if "*" in action], "no action by pattern"
        if statement["Resource"] == "*":
            assert all(action.startswith("ec2:Describe") for action in actions), "everything may only be looked at"
    assert resources["Bucket"]["Properties"]["PublicAccessBlockConfiguration"] == dict.fromkeys(
        ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True
    )


def compose() -> Manifest:
    return yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text())


def test_compose_file_fits_the_specification(tmp_path: Path) -> None:
    check = (tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec")
    fine, said = passes(*check, str(INFRA / "compose" / "compose.yaml"))
    assert fine, said
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((INFRA / "compose" / "compose.yaml").read_text().replace("mem_limit", "memory_limit"))
    assert not passes(*check, str(wrong))[0]


def test_compose_stack_is_closed_and_its_secrets_are_files() -> None:
    stack = compose()
    for name, service in stack["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert not service["image"].endswith(":latest")
        for variable, value in service.get("environment", {}).items():
            assert not SECRET.search(variable) or value.startswith("/run/secrets/"), variable
        assert set(service.get("secrets", [])) <= stack["secrets"].keys()
        assert service.get("depends_on", {}).keys() <= stack["services"].keys()
        assert set(re.findall(r"/run/secrets/(\w+)", str(service))) <= set(service.get("secrets", []))


@pytest.mark.skipif(os.geteuid() != 0, reason="the script gives the keys to the containers' user, which takes root")
def test_secrets_of_the_stack_are_made_once_and_for_the_containers_alone(tmp_path: Path) -> None:
    script = shutil.copy(ROOT / "infra/compose/make_secrets.sh", tmp_path)
    subprocess.run(["sh", script], check=True, capture_output=True)
    files = sorted((tmp_path / "secrets").iterdir())
    assert [file.name for file in files] == ["postgres_password", "ray_token", "s3_keys"]
    for path in (tmp_path / "secrets", *files):
        state = path.stat()
        assert (state.st_uid, state.st_gid, state.st_mode & 0o027) == (1000, 1000, 0), path
    made = {file.name: file.read_text() for file in files}
    assert len(set(made.values())) == 3
    assert [len(line) > 15 for line in made["s3_keys"].splitlines()] == [True, True]
    subprocess.run(["sh", script], check=True, capture_output=True)
    assert {file.name: file.read_text() for file in files} == made, "a second time changes nothing"


def test_dockerfile_passes_hadolint(tmp_path: Path) -> None:
    fine, said = passes(tool("hadolint"), str(INFRA / "Dockerfile"))
    assert fine, said
    wrong = tmp_path / "Dockerfile"
    wrong.write_text((INFRA / "Dockerfile").read_text().replace("FROM python:${PYTHON} AS run", "FROM python AS run"))
    assert not passes(tool("hadolint"), str(wrong))[0]


def test_image_is_staged_pinned_and_not_roots() -> None:
    text = (INFRA / "Dockerfile").read_text()
    assert len(re.findall(r"^FROM ", text, re.MULTILINE)) == 2
    assert re.search(r"^ARG PYTHON=3\.1[12]\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000:1000"
    assert "--require-hashes" in text
    assert "--verify-hashes" in text
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())
        kept = (ROOT / ".dockerignore").read_text().split()
        assert all(f"!{name}" in kept for name in copied.split())


def test_image_has_every_extra() -> None:
    """What a verb can be asked for works in the image, in both of its variants."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    build = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    installs = [set(re.findall(r"--extra (\w+)", command)) for command in build.split(";") if "--extra" in command]
    assert installs == [set(extras), set(extras)]


_DEBIANS_PROFILE = """
PATH=/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games
export PATH
for i in {folder}/etc/profile.d/*.sh; do if [ -r "$i" ]; then . "$i"; fi; done
"""


def test_login_shell_of_the_image_finds_ray_tavlad_and_their_python(tmp_path: Path) -> None:
    """Ray's cluster launcher works through login shells, and Debian's /etc/profile forgets the image's PATH."""
    text = (INFRA / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    binaries, profile = tmp_path / "opt/tavlad/bin", tmp_path / "etc/profile.d"
    binaries.mkdir(parents=True)
    profile.mkdir(parents=True)
    for name in ("ray", "tavlad", "python"):
        (binaries / name).touch(mode=0o755)
    for command in re.findall(r"echo .* > /etc/profile\.d/\S+", text):
        subprocess.run(["sh", "-c", re.sub(r"/(opt|etc)/", rf"{tmp_path}/\1/", command)], check=True)
    (tmp_path / ".bash_profile").write_text(_DEBIANS_PROFILE.format(folder=tmp_path))
    shell = ["bash", "--login", "-c", "command -v ray tavlad python"]
    done = subprocess.run(
        shell, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(binaries / name) for name in ("ray", "tavlad", "python")]
