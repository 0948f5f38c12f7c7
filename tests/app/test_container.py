"""Dockerfile and compose.yaml, held against the server and its requirements; no image is built."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from app.main import create_app
from app.ml.machine import num_cores
from app.settings import ENV_PREFIX, Settings

BACKEND = Path(__file__).resolve().parents[2] / "backend"
DOCKERFILE = (BACKEND / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} +(.*)$", DOCKERFILE, re.M)


def installed() -> set[str]:
    """What is left of requirements.txt after the Dockerfile's sed has cut a range of lines out."""
    (first, last) = re.findall(r"sed '/(.+?)/,/(.+?)/d' /tmp/requirements\.txt", DOCKERFILE)[0]
    text = (BACKEND / "requirements.txt").read_text(encoding="utf-8")
    kept, count = re.subn(rf"{first}.*?{last}[^\n]*\n", "", text, flags=re.M | re.S)
    assert count == 1
    return set(re.findall(r"^([A-Za-z][\w.-]*)", kept, re.M))


def test_the_image_holds_all_packages_that_the_server_imports() -> None:
    imported = set()
    for path in (BACKEND / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    packages = {
        name: {d.lower().replace("_", "-") for d in distributions}
        for name, distributions in packages_distributions().items()
    }
    needed = imported - sys.stdlib_module_names - {"app"}
    brought_by_others = {"pydantic", "pydantic_core", "starlette", "anyio"}  # by FastAPI
    brought_by_others |= {"pandas"}  # by MLflow, which alone imports app.ml.pyfunc
    assert {"torch", "fastapi"} <= needed
    assert [n for n in needed - brought_by_others if not packages[n] & installed()] == []


def test_the_image_holds_no_package_of_training() -> None:
    assert installed().isdisjoint({"mlflow", "matplotlib", "scikit-learn", "tqdm", "onnx"})


def test_what_is_copied_is_there() -> None:
    copied = [line.split()[0] for line in instructions("COPY")]
    assert copied and all((BACKEND / source).exists() for source in copied)


def test_it_starts_as_the_guide_says_and_asks_a_real_address() -> None:
    guide = (BACKEND.parent / "MODEL_TRAINING_GUIDE.md").read_text(encoding="utf-8")
    command = [word for word in json.loads(instructions("CMD")[-1]) if word != "0.0.0.0"]
    assert "\n" + " ".join(word for word in command if word != "--host") + "\n" in guide
    (probed,) = re.findall(r"127\.0\.0\.1:8000(/\w+)", DOCKERFILE)
    assert probed in create_app(Settings()).openapi()["paths"]


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy_is_not_asked_for_the_health(name: str) -> None:
    """Docker passes the proxies of its own configuration on to every container."""
    (probe,) = instructions("HEALTHCHECK")
    _, flag, code = json.loads(probe[probe.index("[") :])
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        code = code.replace(":8000/", f":{server.server_port}/")
        environment = {**os.environ, name: "http://127.0.0.1:9", "no_proxy": ""}
        command = [sys.executable, flag, code]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
    assert result.returncode == 0, result.stderr


def test_the_container_is_not_tried_where_nothing_can_run_it(tmp_path: Path) -> None:
    for name in ("docker", "podman"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    command = ["bash", BACKEND / "container_test.sh", tmp_path]
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "skipped, neither docker nor podman works here" in done.stdout


def test_nothing_in_the_image_reports_to_anybody() -> None:
    assert "ORT_DISABLE_TELEMETRY=1" in instructions("ENV")[0].split()


def test_compose_needs_no_number_of_cores() -> None:
    """`cpus` above what the host has does not start; the server counts what it may use."""
    (service,) = yaml.safe_load((BACKEND / "compose.yaml").read_text())["services"].values()
    assert "cpus" not in service
    cores = num_cores()
    assert Settings().workers == (cores + 1 if cores > 1 else 1)


def test_compose_fits_the_image_and_the_server() -> None:
    (service,) = yaml.safe_load((BACKEND / "compose.yaml").read_text())["services"].values()
    host, models, mode = service["volumes"][0].split(":")
    assert instructions("ENV")[0].split()[0] == f"{ENV_PREFIX}MODEL_DIR={models}" and mode == "ro"
    assert (BACKEND / host).resolve() == BACKEND.parent / "ml-models"
    assert service["ports"][0].endswith(f":{instructions('EXPOSE')[0]}")
    values = service["environment"]
    with pytest.MonkeyPatch.context() as environment:
        for name, value in values.items():
            environment.setenv(name, value)
        assert {name.lower() for name in values} == {
            f"{ENV_PREFIX}{name}".lower() for name in Settings().model_fields_set
        }
