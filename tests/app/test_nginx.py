"""nginx.conf in a real nginx, in front of a real server."""

import io
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image
from tests.support.live_server import BACKEND, LiveServer, live_server

from app.settings import Settings

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian's package nginx-light)"),
]
OURS = (BACKEND / "nginx.conf").read_text(encoding="utf-8")
# What people write who have read one page about it: HTTP/1.0 to the server, and a larger limit.
SHORT = (
    "server { listen 80; client_max_body_size 100m;"
    "location / { proxy_pass http://127.0.0.1:8000; } }"
)
MEGABYTE = 2**20


@contextmanager
def nginx(folder: Path, server_port: int, configuration: str) -> Iterator[str]:
    """Run nginx in the foreground; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = configuration.replace("listen 80", f"listen 127.0.0.1:{port}")
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server_port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = " ".join(f"{kind}_temp_path {folder / kind};" for kind in kinds)
    user = "user root;" if os.getuid() == 0 else ""
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off; {user} pid {folder / 'pid'}; error_log {folder / 'error.log'};"
        f"events {{}} http {{ access_log off; {places} {text} }}"
    )
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(path)])
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert process.poll() is None, (folder / "error.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(model_dir, tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def url(server: LiveServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nginx(tmp_path_factory.mktemp("nginx"), server.port, OURS) as url:
        yield url


def post(url: str, data: bytes) -> Any:
    files = {"file": ("lunch.jpg", data)}
    return httpx2.post(f"{url}/api/v1/predict", files=files, timeout=60)


def assert_error(response: Any, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"code", "detail", "request_id"}
    assert response.json()["code"] == code


def photo(size: tuple[int, int]) -> bytes:
    image = Image.effect_noise(size, 90)
    image.save(buffer := io.BytesIO(), "JPEG", quality=95)
    return buffer.getvalue()


def test_photos_pass(url: str) -> None:
    large = photo((4032, 3024))
    assert len(large) > 4 * MEGABYTE  # nginx's own limit is 1 MB
    for data in (photo((320, 240)), large):
        assert post(url, data).status_code == 200


@pytest.mark.parametrize("megabytes", [21, 23, 25, 60])
@pytest.mark.parametrize("configuration", [OURS, SHORT], ids=["ours", "short"])
def test_what_is_too_large_is_told_so(
    configuration: str, megabytes: int, server: LiveServer, tmp_path: Path
) -> None:
    with nginx(tmp_path, server.port, configuration) as url:
        for _ in range(5):
            assert_error(post(url, bytes(megabytes * MEGABYTE)), 413, "too_large")


def test_the_server_knows_its_client(url: str, server: LiveServer) -> None:
    headers = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
    response = httpx2.get(f"{url}/health", headers=headers)
    request_id = response.headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", request_id)
    assert server.line_of(request_id)["client"] == "203.0.113.7"


@pytest.mark.parametrize("slash", ["", "/"])
def test_what_is_private_is_hidden(slash: str, url: str) -> None:
    for path in ("metrics", "review", "api/v1/review", f"api/v1/review/{'0' * 32}/photo"):
        assert_error(httpx2.get(f"{url}/{path}{slash}"), 404, "not_found")
    assert_error(httpx2.post(f"{url}/api/v1/model/reload{slash}"), 404, "not_found")


def test_the_servers_own_errors_pass(url: str) -> None:
    assert_error(post(url, b"text"), 415, "unsupported_image")
    assert_error(httpx2.get(f"{url}/nothing"), 404, "not_found")
    assert_error(httpx2.get(f"{url}/{'x' * 20_000}"), 414, "malformed_request")


def test_without_a_server_the_error_has_the_one_shape_too(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with nginx(tmp_path, nobody.getsockname()[1], OURS) as url:
            assert_error(httpx2.get(f"{url}/health"), 502, "stopping")


def test_the_limits_fit_the_servers(url: str) -> None:
    """What is just too large for the server is refused by the server, whose answer says more."""
    (limit,) = re.findall(r"client_max_body_size (\d+)m;", OURS)
    assert int(limit) * MEGABYTE > Settings().max_upload_bytes
    assert "request_id" in post(url, bytes(21 * MEGABYTE)).json()
    (wait,) = re.findall(r"proxy_read_timeout (\d+)s;", OURS)
    assert int(wait) > Settings().upload_timeout_seconds
