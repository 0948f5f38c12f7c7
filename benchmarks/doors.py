"""Is it the same model behind every door, and what does each one cost?

    python benchmarks/doors.py --model_dir ml-models --data_dir data/food-101
    python benchmarks/doors.py --model_dir ml-models --data_dir data/food-101 --doors onnx pyfunc

Each door answers the test photos of a folder in the layout of Food-101, in a process of its own, on
one thread. Start-up is from the start of that process to its first answer. The difference is the
largest one of any class's probability from that of the plain network. A new door is a row of DOORS.
Those of LiteRT (`pip install ai-edge-litert`) and the browser ask files that --export wrote; the
browser and the page need Chromium and, in the folder of the files for ONNX,
`npm install onnxruntime-web`. Spark needs `pip install pyspark` and Java.
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
from typing import Any, NamedTuple

import alternating

from app.ml.artifacts import read_record, released_files
from app.ml.forms import FORM_SUFFIXES, Runtime

Answers = list[dict[str, float]]  # class -> probability, a photo each
Ask = Callable[[list[str]], Answers]
PLAIN = "plain"
LAST = "answers.json"
MODEL, EXPORTS = "model", "exports"
REPOSITORY = Path(__file__).resolve().parents[1]
START_SECONDS = 300


# The doors: each is given the folder of a version and the file that it loads, and gives a function
# that answers photos ------------------------------------------------------------------------------


@contextmanager
def in_process(folder: Path, file: Path) -> Iterator[Ask]:
    from app.ml.predictor import load_model_for_inference

    model = load_model_for_inference(folder, runtime=runtime_of(file), num_threads=1)

    def ask(photos: list[str]) -> Answers:
        return [dict(model.predict(photo, len(model.classes)).top) for photo in photos]

    yield ask


def runtime_of(file: Path) -> Runtime:
    """Name the form that a released file is."""
    suffix = file.name[file.name.index(".") :]
    return next(runtime for runtime, own in FORM_SUFFIXES.items() if own == suffix)


@contextmanager
def pyfunc(folder: Path, file: Path) -> Iterator[Ask]:
    import mlflow
    import pandas as pd

    config = {"runtime": runtime_of(file), "num_threads": 1}
    model = mlflow.pyfunc.load_model(str(folder), model_config=config)
    top_k = num_classes(folder)

    def ask(photos: list[str]) -> Answers:
        found = model.predict(pd.DataFrame({"image": photos}), {"top_k": top_k})
        return [as_answer(top) for top in found["top_predictions"]]

    yield ask


@contextmanager
def served(folder: Path, _: Path) -> Iterator[Ask]:
    """`mlflow models serve`, a photo a request; it takes the fastest form, as our server does,
    which is INT8 on CPUs with instructions for it."""
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
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"{address} did not answer")


@contextmanager
def spark(folder: Path, file: Path) -> Iterator[Ask]:
    """Spark on one core of this machine; its start is part of every cluster's."""
    import mlflow
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    for name in ("spark.driver.host", "spark.driver.bindAddress"):
        builder = builder.config(name, "127.0.0.1")
    session = builder.getOrCreate()
    config = {"runtime": runtime_of(file), "num_threads": 1}
    params = {"top_k": num_classes(folder)}
    answer = mlflow.pyfunc.spark_udf(session, str(folder), params=params, model_config=config)

    def ask(photos: list[str]) -> Answers:
        table = session.read.format("binaryFile").load([Path(photo).as_uri() for photo in photos])
        rows = table.select("path", answer(table.content.alias("image")).alias("answer")).collect()
        found = {Path(row.path).name: row.answer.top_predictions for row in rows}
        return [as_answer(found[Path(photo).name]) for photo in photos]

    yield ask
    session.stop()


@contextmanager
def litert(folder: Path, file: Path) -> Iterator[Ask]:
    from ai_edge_litert.interpreter import Interpreter

    from app.ml.preprocessing import EvalTransform, load_image

    record = read_record(folder)
    transform = EvalTransform(record.preprocessing)
    run = Interpreter(str(file), num_threads=1).get_signature_runner()

    def ask(photos: list[str]) -> Answers:
        images = (transform(load_image(photo)).permute(1, 2, 0).numpy() for photo in photos)
        answers = (run(image=image[None])["probabilities"][0].tolist() for image in images)
        return [dict(zip(record.classes, answer, strict=True)) for answer in answers]

    yield ask


@contextmanager
def browser(folder: Path, file: Path) -> Iterator[Ask]:
    """The lines of docs/exports.md in Chromium, which also decodes and scales the photos."""
    classes = read_record(folder).classes
    text = (REPOSITORY / "docs" / "exports.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```js\n(.*?)^```", text, re.M | re.S)
    program = program.replace("food_model_v3.int8.onnx", file.name)
    page = f"<script type=module>{program} window.answer = answer;</script>"

    def reply(route: Any) -> None:
        name = urllib.parse.urlsplit(route.request.url).path.removeprefix("/")
        if name:
            route.fulfill(path=file.parent / name)
        else:
            route.fulfill(body=page, content_type="text/html")

    with new_tab() as tab:
        tab.route("**/*", reply)
        tab.goto("http://127.0.0.1/")
        tab.wait_for_function("!!window.answer")
        yield lambda photos: in_tab(tab, photos, classes)


@contextmanager
def page(folder: Path, _: Path) -> Iterator[Ask]:
    """What the server's page does without the server, with its own resizing of the photos."""
    port = free_port()
    address, classes = f"http://127.0.0.1:{port}", read_record(folder).classes
    runtime = file_of(folder, BROWSER_RUNTIME)
    settings = {"NUTRILEARN_MODEL_DIR": str(folder), "NUTRILEARN_OFFLINE_DIR": str(runtime)}
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", port]
    with running(command, f"{address}/ready", **settings), new_tab() as tab:
        tab.goto(f"{address}/health")  # whose policy, unlike the page's, lets scripts be tried
        tab.evaluate(LOAD_PAGE)
        yield lambda photos: in_tab(tab, photos, classes)


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


@contextmanager
def new_tab() -> Iterator[Any]:
    """Inside, Chromium has an empty page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"))
        tab = chromium.new_page()
        tab.set_default_timeout(1000 * START_SECONDS)
        yield tab
        chromium.close()


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


class Door(NamedTuple):
    """file: that the door loads, from the folder that holds the version's; the braces stand for
    its number."""

    open: Callable[[Path, Path], AbstractContextManager[Ask]]
    file: str


def file_of(folder: Path, file: str) -> Path:
    return folder.parent / file.format(read_record(folder).version)


RELEASED = f"{MODEL}/food_model_v{{0}}"
LITERT = f"{EXPORTS}/v{{0}}-litert/food_model_v{{0}}"
ONNX = f"{EXPORTS}/v{{0}}-onnx/food_model_v{{0}}"
BROWSER_RUNTIME = f"{EXPORTS}/v{{0}}-onnx/node_modules/onnxruntime-web/dist"
DOORS = {
    PLAIN: Door(in_process, f"{RELEASED}.pth"),
    "onnx": Door(in_process, f"{RELEASED}.onnx"),
    "int8": Door(in_process, f"{RELEASED}.int8.onnx"),
    "pyfunc": Door(pyfunc, f"{RELEASED}.onnx"),
    "models serve": Door(served, f"{RELEASED}.int8.onnx"),
    "spark": Door(spark, f"{RELEASED}.onnx"),
    "litert": Door(litert, f"{LITERT}.tflite"),
    "litert fp16": Door(litert, f"{LITERT}.fp16.tflite"),
    "litert int8": Door(litert, f"{LITERT}.int8.tflite"),
    "browser": Door(browser, f"{ONNX}.onnx"),
    "browser int8": Door(browser, f"{ONNX}.int8.onnx"),
    "page": Door(page, f"{RELEASED}.int8.onnx"),
}


# What is measured -----------------------------------------------------------------------------


def measure(door: Door, folder: Path, photos: list[str], began: float) -> dict[str, Any]:
    """Answer all photos; the first one, alone, ends the start-up."""
    import torch

    torch.set_num_threads(1)
    with door.open(folder, file_of(folder, door.file)) as ask:
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
    folder = scratch / MODEL
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


def row(
    name: str, size: int, found: dict[str, Any], plain: dict[str, Any] | None, actual: list[str]
) -> str:
    guesses = [max(answer, key=answer.__getitem__) for answer in found["answers"]]
    top1 = sum(g == a for g, a in zip(guesses, actual, strict=True)) / len(actual)
    difference = "-"
    if plain:
        pairs = zip(found["answers"], plain["answers"], strict=True)
        largest = max(abs(ours[c] - theirs[c]) for ours, theirs in pairs for c in theirs)
        difference = f"{largest:.1e}"
    return (
        f"| {name} | {top1:.4f} | {difference} | {size / 1e6:.1f} | {found['startup']:.1f} "
        f"| {found['ms']:.1f} |"
    )


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
    print("| door | top-1 | largest difference | size, MB | start-up, s | ms a photo |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        folder, plain = registered_copy(options.model_dir, Path(scratch)), None
        for name in dict.fromkeys([PLAIN, *options.doors]):
            if measured := in_own_process(name, options, folder):
                actual = [photo.split("/")[0] for photo in names]
                size = file_of(folder, DOORS[name].file).stat().st_size
                print(row(name, size, measured, plain, actual), flush=True)
                plain = plain or measured


if __name__ == "__main__":
    main()
