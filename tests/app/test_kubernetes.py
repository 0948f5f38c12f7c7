"""The Kubernetes manifests, held against their schemas and the programs that they start."""

import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.main import create_app
from app.settings import ENV_PREFIX, Settings
from training.commands.cli import check_options, make_cli
from training.config import REPOSITORY, config_from_args

FOLDER = REPOSITORY / "backend" / "kubernetes"
VERSIONS = ("1.33", "1.34")  # of Kubernetes; what backoffLimitPerIndex needs is older


def read(name: str) -> dict[str, Any]:
    """The objects of a manifest, by kind."""
    objects = yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))
    return {one["kind"]: one for one in objects}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_each_object_follows_its_schema(path: Path, version: str) -> None:
    for one in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        kubernetes_validate.validate(one, version, strict=True)


def test_the_schemas_can_refuse() -> None:
    wrong = read("server.yaml")["Service"]
    wrong["spec"]["ports"][0]["targetport"] = 8000
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_traffic_reaches_the_server_and_its_probes_ask_what_there_is() -> None:
    objects = read("server.yaml")
    pod = objects["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000}
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        selector = objects[kind]["spec"]["selector"]
        assert selector.get("matchLabels", selector) == pod["metadata"]["labels"]
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] in ports
    paths = create_app(Settings()).openapi()["paths"]
    probes = {name: probe["httpGet"] for name, probe in container.items() if name.endswith("Probe")}
    assert len(probes) == 3
    for probe in probes.values():
        assert probe["path"] in paths and probe["port"] in ports
    assert probes["livenessProbe"]["path"] == "/health", "a server without a model lives"
    assert probes["readinessProbe"]["path"] == "/ready"


def test_the_server_finds_its_models_and_has_time_to_stop() -> None:
    pod = read("server.yaml")["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    settings = {variable["name"]: variable["value"] for variable in container["env"]}
    names = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert set(settings) <= names
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert settings["NUTRILEARN_MODEL_DIR"] == mounts["models"]
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    dockerfile = (REPOSITORY / "backend" / "Dockerfile").read_text(encoding="utf-8")
    (graceful,) = [line for line in dockerfile.splitlines() if "--timeout-graceful" in line]
    seconds = int(graceful.split('"')[-2]) + int(
        container["lifecycle"]["preStop"]["exec"]["command"][-1]
    )
    assert pod["terminationGracePeriodSeconds"] > seconds
    assert f"USER {pod['securityContext']['runAsUser']}:" in dockerfile


def test_the_number_of_replicas_follows_a_metric_that_there_is() -> None:
    objects = read("server.yaml")
    scaled = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert "replicas" not in objects["Deployment"]["spec"], "applying it again would reset them"
    (metric,) = scaled["metrics"]
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert metric["resource"]["name"] in container["resources"]["requests"]
    assert objects["PodDisruptionBudget"]["spec"]["minAvailable"] < scaled["minReplicas"]


def test_the_job_predicts_every_share_once() -> None:
    job = read("predict-job.yaml")["Job"]["spec"]
    assert job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    python, script, *words = container["command"]
    assert python == "python"
    assert script.removeprefix("/nutrilearn/") == "backend/train_model.py"
    shards = []
    for index in range(job["completions"]):
        line = shlex.join(words).replace("$(JOB_COMPLETION_INDEX)", str(index))
        options = make_cli(None).parse_args(shlex.split(line))
        check_options(options)
        config_from_args(options)
        assert options.predict == ["/photos"]
        shards.append(options.shard)
    assert [shard.index for shard in shards] == list(range(job["completions"]))
    assert {shard.count for shard in shards} == {job["completions"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert not mounts[container["workingDir"]].get("readOnly"), "the tables are written there"
    assert {"/photos", "/models", "/dev/shm"} <= set(mounts)
