"""How fast and how steady the server is, against a minimal endpoint with the same model.

    python benchmarks/serving.py                    # all of it, about 8 minutes
    python benchmarks/serving.py speed --seconds 3  # a quick look
    python benchmarks/serving.py memory --requests 2000

Parts:
    speed      requests/s and latency at 1 to 64 clients, in alternating rounds, against the
               minimal endpoint (`minimal_app` below: what a tutorial shows) or --against another
               copy of this repository; and /health while the server is saturated
    memory     over 10,000 requests
    reload     a new model every second under load
    batching   is a batch cheaper per photo?
    quota      fewer cores than there seem to be; needs the right to make control groups
    departure  an answer behind 60 heavy photos whose clients have left
    large      /health beside 32 clients that send 14 MB of anything

Needs a trained model; everything stays on this machine.
"""

import argparse
import asyncio
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "backend"))

import torch
from fastapi import FastAPI, UploadFile
from PIL import Image
from torchvision import transforms

from app.ml.artifacts import NoModelError, read_record, read_state
from app.ml.machine import num_cores
from app.ml.model import build_model
from app.ml.predictor import forms_of, load_model_for_inference

TOKEN = "only-for-this-benchmark"
MODEL_DIR_VARIABLE = "BENCHMARK_MODEL_DIR"


# The baseline ---------------------------------------------------------------------------------


def minimal_app() -> FastAPI:
    """Build the usual endpoint: PIL, torchvision transforms and eager PyTorch in `async def`."""
    model_dir = Path(os.environ[MODEL_DIR_VARIABLE])
    record = read_record(model_dir)
    model = build_model(record.model_name, len(record.classes))
    model.load_state_dict(read_state(model_dir, record))
    model.eval()
    recipe = record.preprocessing
    transform = transforms.Compose(
        [
            transforms.Resize(recipe.resize),
            transforms.CenterCrop(recipe.crop),
            transforms.ToTensor(),
            transforms.Normalize(recipe.mean, recipe.std),
        ]
    )
    app = FastAPI()

    @app.post("/api/v1/predict")
    async def predict(file: UploadFile) -> dict[str, Any]:
        image = Image.open(io.BytesIO(await file.read())).convert("RGB")
        with torch.no_grad():
            probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)[0]
        confidence, index = probabilities.max(dim=0)
        return {"food_name": record.classes[int(index)], "confidence": float(confidence)}

    return app


# Servers --------------------------------------------------------------------------------------


@dataclass
class Server:
    """A server process on this machine."""

    name: str
    port: int
    seconds_to_ready: float = 0.0


@contextmanager
def running(
    name: str,
    arguments: list[str],
    folder: Path,
    environment: Mapping[str, str],
    group: Path | None = None,
) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = Server(name, free.getsockname()[1])
    command = [sys.executable, "-m", "uvicorn", *arguments, "--port", str(server.port)]
    if group:
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--no-access-log", "--log-level", "warning"],
            cwd=folder,
            env={**os.environ, **environment},
            stderr=log,
        )
        try:
            if not _listens(server, process):
                log.seek(0)
                raise SystemExit(f"the {name} server did not start:\n{log.read().decode()}")
            server.seconds_to_ready = time.perf_counter() - started
            yield server
        finally:
            process.terminate()
            process.wait(30)


def _listens(server: Server, process: "subprocess.Popen[bytes]") -> bool:
    """Wait; uvicorn listens only when the start, loading the model included, is done."""
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", server.port)) == 0:
                return True
        if process.poll() is not None:
            return False
        time.sleep(0.1)
    return False


@contextmanager
def nutrilearn(
    model_dir: Path,
    group: Path | None = None,
    backend: Path = ROOT / "backend",
    name: str = "NutriLearn",
    settings: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    environment = {"NUTRILEARN_MODEL_DIR": str(model_dir), "NUTRILEARN_RELOAD_TOKEN": TOKEN}
    environment |= settings or {}
    with running(name, ["app.main:app"], backend, environment, group) as server:
        yield server


@contextmanager
def minimal(model_dir: Path) -> Iterator[Server]:
    arguments = ["--factory", "serving:minimal_app"]
    environment = {MODEL_DIR_VARIABLE: str(model_dir)}
    with running("minimal", arguments, Path(__file__).parent, environment) as server:
        yield server


@contextmanager
def cpu_group(cores: float) -> Iterator[Path]:
    """A control group (version 1) of so many cores' time."""
    folder = Path("/sys/fs/cgroup/cpu") / f"nutrilearn-benchmark-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / "cpu.cfs_quota_us").write_text(str(round(cores * 100_000)))
        yield folder
    finally:
        folder.rmdir()


# Clients --------------------------------------------------------------------------------------


@dataclass
class Load:
    """What the clients of one server saw."""

    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the server, where it was measured
    statuses: Counter[int] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return self.statuses[200] / self.seconds

    def percentile(self, percent: int) -> float:
        """In milliseconds."""
        return 1000 * statistics.quantiles(self.latencies, n=100)[percent - 1]


def http(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


def photo_request(photo: bytes) -> bytes:
    head = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    body = head + photo + b"\r\n--edge--\r\n"
    kind = "Content-Type: multipart/form-data; boundary=edge"
    return http("POST", "/api/v1/predict", body, kind)


class Connection:
    """One keep-alive connection; as little work per request as possible, for it shares the CPU."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def __aenter__(self) -> "Connection":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def ask(self, request: bytes) -> tuple[int, bytes, bytes]:
        """-> status, headers, body."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        body = await self.reader.readexactly(int(length[1])) if length else b""
        return int(head[9:12]), head, body


async def load(server: Server, photos: list[bytes], clients: int, until: "Stop") -> Load:
    """Every client asks again as soon as it is answered."""
    result = Load()

    async def client(number: int) -> None:
        async with Connection(server) as connection:
            while until.goes_on(result):
                started = time.perf_counter()
                number += 1
                status, head, _ = await connection.ask(photos[number % len(photos)])
                result.latencies.append(time.perf_counter() - started)
                result.statuses[status] += 1
                if version := re.search(rb"x-model-version: (\d+)", head):
                    result.versions[version[1].decode()] += 1

    started = time.perf_counter()
    await asyncio.gather(*(client(i) for i in range(clients)))
    result.seconds = time.perf_counter() - started
    return result


@dataclass
class Stop:
    """When a load ends: after some seconds or some requests."""

    seconds: float = float("inf")
    requests: float = float("inf")

    def __post_init__(self) -> None:
        self.end = time.perf_counter() + self.seconds

    def goes_on(self, result: Load) -> bool:
        return time.perf_counter() < self.end and len(result.latencies) < self.requests


async def poll_health(server: Server, until: Stop) -> list[float]:
    """Latencies of /health in seconds, asked every 20 ms."""
    latencies, request = [], http("GET", "/health")
    async with Connection(server) as connection:
        while until.goes_on(Load()):
            started = time.perf_counter()
            await connection.ask(request)
            latencies.append(time.perf_counter() - started)
            await asyncio.sleep(0.02)
    return latencies


# Parts ----------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, photos: list[bytes]) -> None:
    if options.against == ROOT:
        other = minimal(options.model_dir)
    else:
        backend = options.against / "backend"
        models = options.against_models or options.model_dir
        other = nutrilearn(models.resolve(), backend=backend, name="other copy")
    with nutrilearn(options.model_dir) as ours, other as theirs:
        print(f"start to ready: {ours.seconds_to_ready:.1f} s")
        print(f"{'clients':>7} {'server':<11} {'req/s':>7} {'p50':>7} {'p95':>7} {'p99':>7}  ms")
        for clients in options.clients:
            rounds = {server.name: Load() for server in (ours, theirs)}
            for _ in range(options.rounds):
                for server in (ours, theirs):  # alternating, so that both see the same machine
                    merge(rounds[server.name], asyncio.run(timed(server, photos, clients, options)))
            for name, result in rounds.items():
                figures = (result.percentile(percent) for percent in (50, 95, 99))
                cells = " ".join(f"{figure:7.1f}" for figure in figures)
                print(f"{clients:7} {name:<11} {result.rate:7.1f} {cells}  {dict(result.statuses)}")
            ratio = rounds[ours.name].rate / rounds[theirs.name].rate
            print(f"{clients:7} {'ratio':<11} {ratio:7.2f}")
        asyncio.run(saturated_health(ours, photos, options.seconds))


async def timed(
    server: Server, photos: list[bytes], clients: int, options: argparse.Namespace
) -> Load:
    await load(server, photos, clients, Stop(requests=2 * clients))  # warm
    return await load(server, photos, clients, Stop(seconds=options.seconds))


def merge(total: Load, part: Load) -> None:
    total.latencies += part.latencies
    total.seconds += part.seconds
    total.cpu_seconds += part.cpu_seconds
    total.statuses += part.statuses


async def saturated_health(server: Server, photos: list[bytes], seconds: float) -> None:
    stop = Stop(seconds=seconds)
    result, latencies = await asyncio.gather(
        load(server, photos, 32, stop), poll_health(server, stop)
    )
    p99 = 1000 * statistics.quantiles(latencies, n=100)[98]
    print(f"/health with 32 clients at {result.rate:.0f} photos/s: p99 {p99:.1f} ms")


def memory(options: argparse.Namespace, photos: list[bytes]) -> None:
    with nutrilearn(options.model_dir) as server:
        sizes = []
        for _ in range(10):
            stop = Stop(requests=options.requests / 10)
            result = asyncio.run(load(server, photos, 16, stop))
            assert set(result.statuses) == {200}, result.statuses
            sizes.append(asyncio.run(process_metric(server, "resident_memory_bytes")))
            print(f"{options.requests / 10 * len(sizes):8.0f} requests: {sizes[-1] / 1e6:.0f} MB")
        print(f"change from the first tenth to the end: {sizes[-1] / sizes[0] - 1:+.1%}")


async def process_metric(server: Server, name: str) -> float:
    async with Connection(server) as connection:
        _, _, body = await connection.ask(http("GET", "/metrics"))
    match = re.search(rf"\nprocess_{name} (\S+)".encode(), body)
    assert match, f"/metrics has no process_{name} on this system"
    return float(match[1])


def reload(options: argparse.Namespace, photos: list[bytes]) -> None:
    with nutrilearn(options.model_dir) as server:
        asyncio.run(_reload(server, photos, options.seconds))


async def _reload(server: Server, photos: list[bytes], seconds: float) -> None:
    stop = Stop(seconds=seconds)
    result, reloads = await asyncio.gather(
        load(server, photos, 16, stop), keep_reloading(server, stop)
    )
    failed = sum(count for status, count in result.statuses.items() if status != 200)
    print(
        f"{reloads} reloads during {len(result.latencies)} requests: {failed} failed, "
        f"p99 {result.percentile(99):.0f} ms, answers by version {dict(result.versions)}"
    )


async def keep_reloading(server: Server, until: Stop) -> int:
    count = 0
    request = http("POST", "/api/v1/model/reload", b"", f"Authorization: Bearer {TOKEN}")
    async with Connection(server) as connection:
        while until.goes_on(Load()):
            status, _, body = await connection.ask(request)
            assert status == 200, json.loads(body)
            count += 1
            await asyncio.sleep(1)
    return count


def batching(options: argparse.Namespace, _: list[bytes]) -> None:
    """Batches on all cores, against what the server does: a photo per core."""
    cores = num_cores()
    batches = load_model_for_inference(options.model_dir, num_threads=cores)
    crop = batches.record.preprocessing.crop
    for size in (1, 2, 4, 8, 16):
        images = torch.zeros(size, 3, crop, crop, dtype=torch.uint8)
        seconds = median_seconds(lambda images=images: batches.logits(images)) / size  # type: ignore[misc]
        print(f"batch of {size:2} on {cores} threads: {1000 * seconds:6.2f} ms a photo")
    single = load_model_for_inference(options.model_dir, num_threads=1)
    photo = torch.zeros(1, 3, crop, crop, dtype=torch.uint8)
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        seconds = median_seconds(lambda: list(pool.map(single.logits, [photo] * 16))) / 16
    print(f"one by one on {cores} workers: {1000 * seconds:6.2f} ms a photo")


def quota(options: argparse.Namespace, photos: list[bytes]) -> None:
    """Requests/s and CPU time at 8 clients; the cores seen, the quota and WORKERS vary."""
    with tempfile.TemporaryDirectory() as name:
        pretended = Path(name)
        (pretended / "sitecustomize.py").write_text(
            "import os\nos.sched_getaffinity = lambda _: set(range(64))\n"
        )
        print(f"{'seen':>5} {'quota':>6} {'WORKERS':>8} {'req/s':>7} {'of best':>8} {'CPU ms':>7}")
        for limit in (None, 1.0):
            cases = [(seen, workers) for seen in (0, 64) for workers in ("", "1", "2")]
            results = {case: Load() for case in cases}
            for _ in range(options.rounds):
                for seen, workers in cases:
                    environment = {"PYTHONPATH": str(pretended)} if seen else {}
                    environment["NUTRILEARN_WORKERS"] = workers
                    merge(results[seen, workers], _limited(options, photos, limit, environment))
            best = max(result.rate for result in results.values())
            for (seen, workers), result in results.items():
                cells = f"{seen or num_cores():5} {limit or 'none':>6} {workers or 'unset':>8}"
                cpu = 1000 * result.cpu_seconds / result.statuses[200]
                print(f"{cells} {result.rate:7.1f} {result.rate / best:8.2f} {cpu:7.1f}")


def _limited(
    options: argparse.Namespace,
    photos: list[bytes],
    limit: float | None,
    environment: dict[str, str],
) -> Load:
    with ExitStack() as stack:
        group = stack.enter_context(cpu_group(limit)) if limit else None
        server = stack.enter_context(nutrilearn(options.model_dir, group, settings=environment))
        asyncio.run(load(server, photos, 8, Stop(requests=16)))  # warm
        before = asyncio.run(process_metric(server, "cpu_seconds_total"))
        result = asyncio.run(load(server, photos, 8, Stop(seconds=options.seconds)))
        result.cpu_seconds = asyncio.run(process_metric(server, "cpu_seconds_total")) - before
        return result


def departure(options: argparse.Namespace, photos: list[bytes]) -> None:
    heavy = io.BytesIO()
    image = Image.radial_gradient("L").resize((4032, 3024)).convert("RGBA")
    image.save(heavy, "AVIF", speed=10)
    with nutrilearn(options.model_dir) as server:
        asyncio.run(_departure(server, photos[0], photo_request(heavy.getvalue())))


async def _departure(server: Server, photo: bytes, heavy: bytes) -> None:
    async with Connection(server) as connection:
        started = time.perf_counter()
        await connection.ask(heavy)
        one = time.perf_counter() - started
        for _ in range(60):
            async with Connection(server) as leaving:
                leaving.writer.write(heavy)
                await leaving.writer.drain()
                await asyncio.sleep(0.01)
        started = time.perf_counter()
        status, _, _ = await connection.ask(photo)
        seconds = time.perf_counter() - started
    print(
        f"one heavy photo: {one:.2f} s; behind 60 of clients who left: {seconds:.2f} s ({status})"
    )


def large(options: argparse.Namespace, _: list[bytes]) -> None:
    size = 14 * 2**20
    bodies = {
        "random bytes": os.urandom(size),
        "zeros": bytes(size),
        "near boundaries": b"\r\n--edgeX" * (size // 9),
        "padded boundary": b"\r\n--edge" + b" " * size,
        "a JPEG's start, then noise": b"\xff\xd8\xff\xe0" + os.urandom(size),
    }
    with nutrilearn(options.model_dir, backend=options.against / "backend") as server:
        for name, body in bodies.items():
            # The clients are a process of their own, which /health is not measured through.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                pool.submit(int).result()  # it has started
                flood = pool.submit(_flood, server, photo_request(body), options.seconds)
                time.sleep(1)
                latencies = asyncio.run(poll_health(server, Stop(seconds=options.seconds - 2)))
                statuses = dict(sorted(flood.result().items()))
            p99 = 1000 * statistics.quantiles(latencies, n=100)[98]
            print(f"14 MB of {name:<27} /health p99 {p99:6.1f} ms; answers {statuses}")


def _flood(server: Server, request: bytes, seconds: float) -> Counter[int]:
    return asyncio.run(load(server, [request], 32, Stop(seconds=seconds))).statuses


def median_seconds(call: Callable[[], object], repetitions: int = 15) -> float:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# Command --------------------------------------------------------------------------------------

PARTS = {
    "speed": speed,
    "memory": memory,
    "reload": reload,
    "batching": batching,
    "quota": quota,
    "departure": departure,
    "large": large,
}


def drawn_photos(count: int = 8) -> list[bytes]:
    """JPEGs of 512x384 with as much detail as a photo (about 40 kB each)."""
    photos = []
    for seed in range(count):
        noise = Image.effect_noise((128, 96), 60).resize((512, 384), Image.Resampling.BICUBIC)
        colors = [noise, noise.rotate(90 + seed), Image.radial_gradient("L").resize(noise.size)]
        Image.merge("RGB", colors).save(buffer := io.BytesIO(), "JPEG", quality=90)
        photos.append(buffer.getvalue())
    return photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default="all", choices=[*PARTS, "all"])
    parser.add_argument("--model_dir", type=Path, default=ROOT / "ml-models")
    parser.add_argument("--against", type=Path, default=ROOT, help="another copy to compare with")
    parser.add_argument("--against_models", type=Path, help="its models, if it cannot read ours")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs; default: drawn ones")
    parser.add_argument("--seconds", type=float, default=10, help="of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=10_000, help="of the memory part")
    options = parser.parse_args()
    options.model_dir = options.model_dir.resolve()
    try:
        record = read_record(options.model_dir)
    except NoModelError as error:
        parser.error(str(error))
    files = sorted(options.photos.rglob("*.jpg"))[:200] if options.photos else []
    photos = [file.read_bytes() for file in files] or drawn_photos()
    kilobytes = statistics.mean(map(len, photos)) / 1000
    print(
        f"{record.model_name} version {record.version} (forms: {', '.join(forms_of(record))}), "
        f"{num_cores()} cores, "
        f"{len(photos)} photos of {kilobytes:.0f} kB on average"
    )
    for part in (part for part in PARTS if part in options.parts or "all" in options.parts):
        print(f"\n{part}")
        PARTS[part](options, [photo_request(photo) for photo in photos])


if __name__ == "__main__":
    main()
