"""Is it the same model behind every door, and what does each one cost?

    python benchmarks/doors.py --model_dir ml-models --data_dir data/food-101
    python benchmarks/doors.py --model_dir ml-models --data_dir data/food-101 --doors onnx pyfunc

Each door answers the test photos of a folder in the layout of Food-101, in a process of its own, on
one thread. Start-up is from the start of that process to its first answer. The difference is the
largest one of any class's probability from that of the plain network. A new door is a function in
DOORS. Those of LiteRT and the browser ask files that --export wrote; the browser and the page need
Chromium and, in the folder of the files for ONNX, `npm install onnxruntime-web`.
"""

import argparse
import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import alternating

from app.ml.artifacts import read_record, released_files

Answers = list[dict[str, float]]  # class -> probability, a photo each
Ask = Callable[[list[str]], Answers]
PLAIN = "plain"
LAST = "answers.json"
EXPORTS = "exports"
REPOSITORY = Path(__file__).resolve().parents[1]
SERVER_SECONDS = 300


# The doors: each is given the folder of a version and gives a function that answers photos -------


@contextmanager
def in_process(folder: Path, runtime: Any) -> Iterator[Ask]:
    from app.ml.predictor import load_model_for_inference

    model = load_model_for_inference(folder, runtime=runtime, num_threads=1)

    def ask(photos: list[str]) -> Answers:
        return [dict(model.predict(photo, len(model.classes)).top) for photo in photos]

    yield ask


@contextmanager
def pyfunc(folder: Path) -> Iterator[Ask]:
    import mlflow
    import pandas as pd

    config = {"runtime": "onnx", "num_threads": 1}
    model = mlflow.pyfunc.load_model(str(folder), model_config=config)
    top_k = num_classes(folder)

    def ask(photos: list[str]) -> Answers:
        found = model.predict(pd.DataFrame({"image": photos}), {"top_k": top_k})
        return [as_answer(top) for top in found["top_predictions"]]

    yield ask


@contextmanager
def served(folder: Path) -> Iterator[Ask]:
    """`mlflow models serve`, a photo a request; it takes the fastest form, as our server does."""
    port = free_port()
    words = ["models", "serve", "-m", str(folder), "-p", port, "-w", "1", "--env-manager", "local"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    address, top_k = f"http://127.0.0.1:{port}", num_classes(folder)

    def ask(photos: list[str]) -> Answers:
        return [as_answer(post(photo)["top_predictions"]) for photo in photos]

    def post(photo: str) -> dict[str, Any]:
        cell = base64.b64encode(Path(photo).read_bytes()).decode()
        table = {"columns": ["image"], "data": [[cell]]}
        body = json.dumps({"dataframe_split": table, "params": {"top_k": top_k}}).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{address}/invocations", body, headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return dict(json.load(answer)["predictions"][0])

    with running([sys.executable, "-m", "mlflow", *words], f"{address}/ping", PATH=path):
        yield ask


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextmanager
def running(command: list[str], address: str, **environment: str) -> Iterator[None]:
    """Inside, a server runs that answers at the address."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY / "backend",
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(address, process)
        yield
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def wait_for(address: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{address} did not answer")


@contextmanager
def spark(folder: Path) -> Iterator[Ask]:
    """Spark on one core of this machine; its start is part of every cluster's."""
    import mlflow
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    for name in ("spark.driver.host", "spark.driver.bindAddress"):
        builder = builder.config(name, "127.0.0.1")
    session = builder.getOrCreate()
    config = {"runtime": "onnx", "num_threads": 1}
    params = {"top_k": num_classes(folder)}
    answer = mlflow.pyfunc.spark_udf(session, str(folder), params=params, model_config=config)

    def ask(photos: list[str]) -> Answers:
        table = session.read.format("binaryFile").load([Path(photo).as_uri() for photo in photos])
        rows = table.select("path", answer(table.content.alias("image")).alias("answer")).collect()
        found = {Path(row.path).name: row.answer.top_predictions for row in rows}
        return [as_answer(found[Path(photo).name]) for photo in photos]

    yield ask
    session.stop()


# The files that --export wrote ---------------------------------------------------------------


def exported(folder: Path, format: str, suffix: str) -> Path:
    """Find an exported file of the current version, which `registered_copy` links beside it."""
    version = read_record(folder).version
    return folder.parent / EXPORTS / f"v{version}-{format}" / f"food_model_v{version}{suffix}"


@contextmanager
def litert(folder: Path, suffix: str) -> Iterator[Ask]:
    from ai_edge_litert.interpreter import Interpreter

    from app.ml.preprocessing import EvalTransform, load_image

    record = read_record(folder)
    transform = EvalTransform(record.preprocessing)
    path = exported(folder, "litert", suffix)
    run = Interpreter(str(path), num_threads=1).get_signature_runner()

    def ask(photos: list[str]) -> Answers:
        images = (transform(load_image(photo)).permute(1, 2, 0).numpy() for photo in photos)
        answers = (run(image=image[None])["probabilities"][0].tolist() for image in images)
        return [dict(zip(record.classes, answer, strict=True)) for answer in answers]

    yield ask


@contextmanager
def browser(folder: Path, suffix: str) -> Iterator[Ask]:
    """The lines of docs/exports.md in Chromium, which also decodes and scales the photos."""
    from playwright.sync_api import sync_playwright

    path, classes = exported(folder, "onnx", suffix), read_record(folder).classes
    text = (REPOSITORY / "docs" / "exports.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```js\n(.*?)^```", text, re.M | re.S)
    program = program.replace("food_model_v3.int8.onnx", path.name)
    page = f"<script type=module>{program} window.answer = answer;</script>"

    def reply(route: Any) -> None:
        name = urllib.parse.urlsplit(route.request.url).path.removeprefix("/")
        if name:
            route.fulfill(path=path.parent / name)
        else:
            route.fulfill(body=page, content_type="text/html")

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"))
        tab = chromium.new_page()
        tab.route("**/*", reply)
        tab.goto("http://127.0.0.1/")
        tab.wait_for_function("!!window.answer")
        yield lambda photos: in_tab(tab, photos, classes)
        chromium.close()


@contextmanager
def page(folder: Path) -> Iterator[Ask]:
    """What the server's page does without the server, with its own resizing of the photos."""
    from playwright.sync_api import sync_playwright

    port = free_port()
    address, classes = f"http://127.0.0.1:{port}", read_record(folder).classes
    runtime = exported(folder, "onnx", "").parent / "node_modules" / "onnxruntime-web" / "dist"
    settings = {"NUTRILEARN_MODEL_DIR": str(folder), "NUTRILEARN_OFFLINE_DIR": str(runtime)}
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", port]
    with running(command, f"{address}/ready", **settings), sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"))
        tab = chromium.new_page()
        tab.goto(f"{address}/health")  # whose policy, unlike the page's, lets scripts be tried
        tab.evaluate(LOAD_PAGE)
        yield lambda photos: in_tab(tab, photos, classes)
        chromium.close()


LOAD_PAGE = """async () => {
    const { load, recognize } = await import("/static/recognize.js");
    const facts = await (await fetch("/offline/facts")).json();
    const files = ["/offline/ort-wasm-simd-threaded.wasm", `/${facts.file}`];
    const bytes = await Promise.all(files.map(async (file) => (await fetch(file)).arrayBuffer()));
    const model = await load(...bytes, facts);
    window.answer = (photo) => recognize(model, photo);
}"""
ANSWER = """async (data) => {
    const photo = await (await fetch("data:image/jpeg;base64," + data)).blob();
    return (await answer(photo)).probabilities;
}"""


def in_tab(tab: Any, photos: list[str], classes: list[str]) -> Answers:
    """Ask the function `answer` of a page."""
    answers = []
    for photo in photos:
        data = base64.b64encode(Path(photo).read_bytes()).decode()
        answers.append(dict(zip(classes, tab.evaluate(ANSWER, data), strict=True)))
    return answers


def as_answer(top_predictions: Any) -> dict[str, float]:
    return {one["class_name"]: one["confidence"] for one in top_predictions}


def num_classes(folder: Path) -> int:
    return len(read_record(folder).classes)


Door = Callable[[Path], AbstractContextManager[Ask]]
DOORS: dict[str, Door] = {
    PLAIN: lambda folder: in_process(folder, "torch"),
    "onnx": lambda folder: in_process(folder, "onnx"),
    "int8": lambda folder: in_process(folder, "int8"),
    "pyfunc": pyfunc,
    "models serve": served,
    "spark": spark,
    "litert": lambda folder: litert(folder, ".tflite"),
    "litert fp16": lambda folder: litert(folder, ".fp16.tflite"),
    "litert int8": lambda folder: litert(folder, ".int8.tflite"),
    "browser": lambda folder: browser(folder, ".onnx"),
    "browser int8": lambda folder: browser(folder, ".int8.onnx"),
    "page": page,
}


# What is measured -----------------------------------------------------------------------------


def measure(door: Door, folder: Path, photos: list[str], began: float) -> dict[str, Any]:
    """Answer all photos; the first one, alone, ends the start-up."""
    import torch

    torch.set_num_threads(1)
    with door(folder) as ask:
        ask(photos[:1])
        startup, then = time.time() - began, time.perf_counter()
        answers = ask(photos)
        ms = 1000 * (time.perf_counter() - then) / len(photos)
    return {"startup": startup, "ms": ms, "answers": answers}


def in_own_process(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure one door; None if it cannot be opened, which it says itself."""
    result = folder.parent / LAST
    result.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--model_dir", str(folder), "--door", name]
    command += ["--data_dir", str(options.data_dir), "--result", str(result)]
    threads = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with (folder.parent / "log").open("wb") as log:
        subprocess.run(
            [*command, "--began", str(time.time()), "--limit", str(options.limit)],
            env={**os.environ, **threads},
            stdout=log,
            stderr=log,
            check=False,
        )
    if result.exists():
        return dict(json.loads(result.read_text()))
    print(f"{name}: {(folder.parent / 'log').read_text().strip().splitlines()[-1]}")
    return None


def registered_copy(model_dir: Path, scratch: Path) -> Path:
    """Make the folder that MLflow's registry would hold of the current version."""
    from training.run.mlflow_package import write_package

    record = read_record(model_dir)
    folder = scratch / "model"
    write_package(folder, json.loads(record.to_json()), run_id="none")
    for file in released_files(model_dir, record):
        shutil.copy(file, folder)
    (scratch / EXPORTS).symlink_to((model_dir / EXPORTS).resolve())
    return folder


def test_photos(data_dir: Path, limit: int) -> list[str]:
    """List test photos as CLASS/NAME, evenly over the classes."""
    names = (data_dir / "meta" / "test.txt").read_text().split()
    step = max(1, len(names) // limit)
    return names[::step][:limit]


def row(name: str, found: dict[str, Any], plain: dict[str, Any] | None, actual: list[str]) -> str:
    guesses = [max(answer, key=answer.__getitem__) for answer in found["answers"]]
    top1 = sum(g == a for g, a in zip(guesses, actual, strict=True)) / len(actual)
    difference = "-"
    if plain:
        pairs = zip(found["answers"], plain["answers"], strict=True)
        largest = max(abs(ours[c] - theirs[c]) for ours, theirs in pairs for c in theirs)
        difference = f"{largest:.1e}"
    return f"| {name} | {top1:.4f} | {difference} | {found['startup']:.1f} | {found['ms']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_dir", type=Path, required=True)
    parser.add_argument("--data_dir", type=Path, required=True, help="in the layout of Food-101")
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--limit", type=int, default=300, help="photos")
    for name in ("--door", "--began", "--result"):  # of the process of one door
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = test_photos(options.data_dir, options.limit)
    photos = [str((options.data_dir / "images" / f"{name}.jpg").resolve()) for name in names]
    if options.door:
        found = measure(DOORS[options.door], options.model_dir, photos, float(options.began))
        Path(options.result).write_text(json.dumps(found))
        return
    print(alternating.machine())
    print("| door | top-1 | largest difference | start-up, s | ms a photo |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder, plain = registered_copy(options.model_dir, Path(scratch)), None
        for name in dict.fromkeys([PLAIN, *options.doors]):
            if measured := in_own_process(name, options, folder):
                actual = [photo.split("/")[0] for photo in names]
                print(row(name, measured, plain, actual), flush=True)
                plain = plain or measured


if __name__ == "__main__":
    main()
