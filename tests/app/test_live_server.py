"""The server as it is run: connections that break off, early answers, signals, its log."""

import io
import json
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from tests.support.cpu_groups import cpu_group
from tests.support.live_server import BACKEND, LiveServer, live_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs signals of POSIX"),
]
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def heavy_photo() -> bytes:
    """As a phone would send it, in a form that takes about half a second to decode."""
    image = Image.radial_gradient("L").resize((4032, 3024)).convert("RGBA")
    image.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> bytes:
    Image.radial_gradient("L").resize((320, 240)).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One worker, three seconds for an upload, 40 MB for all of them, and no temporary folder."""
    values = {
        "NUTRILEARN_WORKERS": "1",
        "NUTRILEARN_UPLOAD_TIMEOUT_SECONDS": "3",
        "NUTRILEARN_UPLOAD_MEMORY_BYTES": "40000000",
        "TMPDIR": "/nonexistent",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with live_server(model_dir, log, **values) as server:
        yield server


def head(length: int | None = None, *headers: str) -> bytes:
    """The head of a photo's request; chunked without a length."""
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = ["POST /api/v1/predict HTTP/1.1", "Host: x", "Content-Type: image/png", size]
    return "\r\n".join([*lines, *headers, "", ""]).encode()


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], dict[str, Any]]:
    """-> status, headers, body."""
    with connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().decode().strip():
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        body = file.read(int(headers["content-length"]))
    return status, headers, json.loads(body)


def seconds_until_closed(connection: socket.socket) -> float:
    began = time.monotonic()
    connection.settimeout(30)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


def ask(server: LiveServer, data: bytes) -> "httpx2.Response":
    headers = {"Content-Type": "image/jpeg"}
    return httpx2.post(f"{server.url}/api/v1/predict", content=data, headers=headers, timeout=60)


# Clients who leave ----------------------------------------------------------------------------


def test_photos_of_clients_who_left_are_not_computed(
    server: LiveServer, photo: bytes, heavy_photo: bytes
) -> None:
    began = time.monotonic()
    assert ask(server, heavy_photo).status_code == 200
    one = time.monotonic() - began
    connections = [server.connect() for _ in range(40)]
    for connection in connections:
        connection.sendall(head(len(heavy_photo)) + heavy_photo)
    while "nutrilearn_queue_depth 4" not in httpx2.get(f"{server.url}/metrics").text:  # 40
        time.sleep(0.01)
    for connection in connections:
        connection.close()
    began = time.monotonic()
    assert ask(server, photo).status_code == 200
    assert time.monotonic() - began < 4 * one + 1  # not 40 times one
    metrics = httpx2.get(f"{server.url}/metrics").text
    assert "nutrilearn_queue_depth 0.0" in metrics and "nutrilearn_upload_bytes 0.0" in metrics
    (gone,) = re.findall(r'nutrilearn_refusals_total\{code="client_gone"\} (\S+)', metrics)
    assert float(gone) > 30


def test_an_upload_that_breaks_off_is_no_error(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(head(1000) + b"x" * 500)
    deadline = time.monotonic() + 10
    while "nutrilearn_upload_bytes 0.0" not in httpx2.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline
    assert "Traceback" not in server.log.read_text()


# Early answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("megabytes", [21, 60])
@pytest.mark.parametrize("declared", [True, False])
def test_an_answer_before_the_end_of_the_body_arrives(
    declared: bool, megabytes: int, server: LiveServer
) -> None:
    """At a client that, as most do, writes all of its body before it reads."""
    piece, size = bytes(MEGABYTE), megabytes * MEGABYTE
    with server.connect() as connection:
        connection.sendall(head(size if declared else None))
        for _ in range(megabytes):
            connection.sendall(piece if declared else b"%x\r\n%b\r\n" % (len(piece), piece))
        if not declared:
            connection.sendall(b"0\r\n\r\n")
        status, headers, error = read_answer(connection)
        assert (status, error["code"]) == (413, "too_large")
        assert headers["connection"] == "close"
        assert seconds_until_closed(connection) < 2


def test_a_client_that_waits_for_permission_is_not_asked_for_its_body(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(head(30 * MEGABYTE, "Expect: 100-continue"))
        assert read_answer(connection)[0] == 413


@pytest.mark.parametrize("path", ["/api/v1/predict", "/api/v1/nothing", "/health"])
def test_a_connection_does_not_outlive_an_early_answer(path: str, server: LiveServer) -> None:
    """The rest of the body is awaited as long as an upload may take, which is 3 s here."""
    request = head(30 * MEGABYTE).replace(b"/api/v1/predict", path.encode())
    with server.connect() as connection:
        connection.sendall(request + b"x")
        assert read_answer(connection)[0] in (404, 405, 413)
        assert seconds_until_closed(connection) < 6


def test_an_endless_body_is_ended(server: LiveServer) -> None:
    piece = b"%x\r\n%b\r\n" % (MEGABYTE, bytes(MEGABYTE))
    sent, began = 0, time.monotonic()
    with server.connect() as connection:
        connection.sendall(head())
        try:
            while time.monotonic() - began < 30:
                connection.sendall(piece)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert time.monotonic() - began < 15 and sent < 400
    assert httpx2.get(f"{server.url}/health").is_success


def test_a_dripping_body_is_answered_and_its_connection_closed(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(head(1000) + b"x")
        status, _, error = read_answer(connection)
        assert (status, error["code"]) == (408, "upload_too_slow")
        assert seconds_until_closed(connection) < 1


def test_small_errors_keep_the_connection(server: LiveServer) -> None:
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(head(4) + b"text")
            assert read_answer(connection)[0] == 415


def test_bodies_under_way_are_bounded(server: LiveServer) -> None:
    """20 uploads of which 4 MB each have arrived, where there is memory for 10 of them."""
    connections = [server.connect() for _ in range(20)]
    for connection in connections:
        connection.sendall(head(8_000_000) + bytes(4_000_000))
    deadline = time.monotonic() + 2.5
    while len(readable := select.select(connections, [], [], 1)[0]) < 10:
        assert time.monotonic() < deadline
    metrics = httpx2.get(f"{server.url}/metrics").text
    answers = [read_answer(connection) for connection in readable]
    assert {status for status, _, _ in answers} == {429}
    assert {headers["retry-after"] for _, headers, _ in answers} == {"1"}
    (held,) = re.findall(r"^nutrilearn_upload_bytes (\S+)", metrics, re.M)
    assert 36_000_000 <= float(held) <= 40_000_000
    for connection in connections:
        connection.close()


# The end --------------------------------------------------------------------------------------


def test_sigterm_ends_the_server_within_seconds(
    model_dir: Path, tmp_path: Path, heavy_photo: bytes
) -> None:
    """With a queue of many seconds, an upload that drips, and no graceful timeout given."""
    log = tmp_path / "log"
    with (
        live_server(model_dir, log, NUTRILEARN_WORKERS="1") as server,
        ThreadPoolExecutor(50) as people,
        server.connect() as dripping,
    ):
        dripping.sendall(head(1000) + b"x")
        asking = [people.submit(ask, server, heavy_photo) for _ in range(50)]
        while "nutrilearn_queue_depth 4" not in httpx2.get(f"{server.url}/metrics").text:
            time.sleep(0.01)
        server.stop(signal.SIGTERM)
        answers = [future.result() for future in asking]
        assert read_answer(dripping)[2]["code"] == "stopping"
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["code"] == "stopping" and answer.headers["retry-after"] == "1"
    times = {line["message"]: datetime.fromisoformat(line["time"]) for line in server.lines()}
    took = times["Application shutdown complete."] - times["Shutting down"]
    assert took < timedelta(seconds=8)
    assert "Traceback" not in log.read_text()


def test_what_is_under_way_is_still_answered(
    model_dir: Path, tmp_path: Path, heavy_photo: bytes
) -> None:
    with (
        live_server(model_dir, tmp_path / "log") as server,
        ThreadPoolExecutor(2) as people,
    ):
        asking = [people.submit(ask, server, heavy_photo) for _ in range(2)]
        while "nutrilearn_queue_depth 2.0" not in httpx2.get(f"{server.url}/metrics").text:
            time.sleep(0.01)
        server.stop(signal.SIGINT)
        assert {future.result().status_code for future in asking} == {200}
        assert "Traceback" not in server.log.read_text()


# The log --------------------------------------------------------------------------------------


def test_every_line_of_the_log_is_json(server: LiveServer, photo: bytes) -> None:
    ask(server, photo)
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    httpx2.post(f"{server.url}/api/v1/predict", content=b"--other", headers=headers)
    for garbage in (b"\x16\x03\x01\x02\0\x01\0", b"GET /\x1b[31m HTTP/1.1\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)
    messages = [line["message"] for line in server.lines()]
    assert "Invalid HTTP request received." in messages  # uvicorn's
    assert any("boundary" in message for message in messages)  # python-multipart's
    (starting,) = [line for line in server.lines() if line["message"] == "starting"]
    assert {"cores", "cpu_quota", "workers", "threads"} <= starting.keys()


def test_the_client_behind_a_proxy_is_logged(server: LiveServer) -> None:
    headers = {"X-Forwarded-For": "203.0.113.7", "X-Request-ID": "proxied"}
    httpx2.get(f"{server.url}/health", headers=headers)
    assert server.line_of("proxied")["client"] == "203.0.113.7"


# What it uses of the machine ------------------------------------------------------------------


def test_onnxruntime_reports_to_nobody(tmp_path: Path) -> None:
    code = "from app.ml.predictor import import_onnxruntime as load; print(load().__name__)"
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(BACKEND), "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "onnxruntime\n", result.stderr
    assert list(tmp_path.rglob("*deviceid*")) == []


def test_the_server_sees_its_cpu_quota(model_dir: Path, tmp_path: Path) -> None:
    with cpu_group(1.0) as group, live_server(model_dir, tmp_path / "log", group=group) as server:
        (starting,) = [line for line in server.lines() if line["message"] == "starting"]
    assert starting["cpu_quota"] == 1.0
    assert starting["cores"] == starting["workers"] == starting["threads"] == 1


def test_collections_do_not_look_at_what_was_imported() -> None:
    """With PyTorch's objects among them, each held everything up for 0.2 seconds."""
    code = "import gc, app.main; app.main.app; print(gc.get_freeze_count())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BACKEND, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 100_000
