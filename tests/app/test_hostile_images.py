"""Whatever is uploaded gets a right answer or a 4xx, in bounded memory, and nobody is held up."""

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.main import create_app
from app.settings import Settings

BACKEND = Path(__file__).resolve().parents[2] / "backend"
MEGABYTE = 2**20
pytestmark = pytest.mark.slow


def plate(size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    return Image.radial_gradient("L").resize(size).convert(mode)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, *extra: bytes, rows: int = 1) -> bytes:
    """A PNG that claims this size and holds so many rows of zeros."""
    channels = {0: 1, 2: 3, 6: 4}[color]
    data = zlib.compress(bytes((1 + (width * depth * channels + 7) // 8) * rows), 9)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (header, *extra, png_chunk(b"IDAT", data), png_chunk(b"IEND", b""))
    )


def jpeg_with_app1(payload: bytes) -> bytes:
    jpeg = encode(plate(), "JPEG")
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def jpeg_claiming(width: int, height: int) -> bytes:
    jpeg = bytearray(encode(plate(), "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(jpeg)


def animation(form: str) -> bytes:
    frames = [plate(), plate().rotate(90), plate().rotate(180)]
    return encode(frames[0], form, save_all=True, append_images=frames[1:])


def half(form: str) -> bytes:
    data = encode(plate((400, 300)), form)
    return data[: len(data) // 2]


def big(form: str, mode: str) -> bytes:
    """As many pixels as a phone takes, in a form that is dear to decode."""
    fast = {"PNG": {"compress_level": 1}, "WEBP": {"method": 0}, "AVIF": {"speed": 10}}
    return encode(Image.new(mode, (4032, 3024)), form, **fast.get(form, {}))


def exif_of_every_kind() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 9, "x" * 60_000  # no such orientation
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.9)
    return encode(plate(), "JPEG", exif=exif)


LOOPING_EXIF = b"Exif\0\0II*\0\x08\0\0\0" + b"\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0" + b"\0" * 4
ZTXT_BOMB = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 * MEGABYTE), 9))
ICC_BOMB = png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(64 * MEGABYTE), 9))

# name -> (statuses that are right, the file)
HOSTILE: dict[str, tuple[tuple[int, ...], Callable[[], bytes]]] = {
    "eps named .jpg": ((415,), lambda: encode(plate(), "EPS")),
    "fits": ((415,), lambda: b"SIMPLE  =                    T".ljust(2880)),
    "tiff named .jpg": ((415,), lambda: encode(plate(), "TIFF")),
    "bmp": ((415,), lambda: encode(plate(), "BMP")),
    "html": ((415,), lambda: b"<!doctype html><script>alert(1)</script>"),
    "svg": ((415,), lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc"/></svg>'),
    "zero bytes": ((400,), lambda: b""),
    "one byte": ((415,), lambda: b"\xff"),
    "a magic and no more": ((400,), lambda: b"\xff\xd8\xff"),
    "half a jpeg": ((400,), lambda: half("JPEG")),
    "half a png": ((400,), lambda: half("PNG")),
    "half a webp": ((400,), lambda: half("WEBP")),
    "half an avif": ((400, 415), lambda: half("AVIF")),
    "400 Mpx of 1 bit": ((413,), lambda: encode(Image.new("1", (20_000, 20_000)), "PNG")),
    "a claim of 60,000 x 60,000": ((413,), lambda: png(60_000, 60_000, 8, 2)),
    "a claim of 0 x 0": ((400, 415), lambda: png(0, 0, 8, 2)),
    "a claim of 2**31 wide": ((400, 413, 415), lambda: png(2**31 - 1, 1, 1, 0, rows=0)),
    "a jpeg that claims 65,000 x 65,000": ((413,), lambda: jpeg_claiming(65_000, 65_000)),
    "a jpeg that claims 7,000 x 7,000": ((200, 400), lambda: jpeg_claiming(7_000, 7_000)),
    "a gif with a huge canvas": (
        *(
            (413,),
            lambda: encode(plate(), "GIF")[:6] + b"\xff\xff" * 2 + encode(plate(), "GIF")[10:],
        ),
    ),
    "a webp of 16,383 x 16,383": (
        *((413,), lambda: encode(Image.new("L", (16_383, 1024)).resize((16_383, 2000)), "WEBP")),
    ),
    "text that unpacks to 64 MB": ((200, 400), lambda: png(64, 64, 8, 2, ZTXT_BOMB, rows=64)),
    "a profile that unpacks to 64 MB": ((200, 400), lambda: png(64, 64, 8, 2, ICC_BOMB, rows=64)),
    "1 x 20,000": ((400,), lambda: encode(plate((1, 20_000)), "PNG")),
    "20,000 x 1": ((400,), lambda: encode(plate((20_000, 1)), "PNG")),
    "1 x 1": ((200,), lambda: encode(plate((1, 1)), "PNG")),
    "animated gif": ((200,), lambda: animation("GIF")),
    "animated webp": ((200,), lambda: animation("WEBP")),
    "avif": ((200,), lambda: encode(plate(), "AVIF")),
    "mpo": ((200,), lambda: encode(plate(), "MPO", save_all=True, append_images=[plate()])),
    "odd exif": ((200,), exif_of_every_kind),
    "64 kB of exif garbage": ((200,), lambda: jpeg_with_app1(b"Exif\0\0" + b"\xff" * 65_000)),
    "exif that points at itself": ((200,), lambda: jpeg_with_app1(LOOPING_EXIF)),
    "12 Mpx png with alpha": ((200,), lambda: big("PNG", "RGBA")),
    "12 Mpx png of 16 bit": ((200,), lambda: big("PNG", "I;16")),
    "12 Mpx gif": ((200,), lambda: big("GIF", "P")),
    "12 Mpx avif with alpha": ((200,), lambda: big("AVIF", "RGBA")),
    "12 Mpx webp with alpha": ((200,), lambda: big("WEBP", "RGBA")),
    "25 Mpx webp": ((413,), lambda: encode(Image.new("RGBA", (5000, 5000)), "WEBP", method=0)),
    "64 Mpx jpeg": ((200,), lambda: encode(Image.new("RGB", (8000, 8000)), "JPEG")),
    "24 Mpx progressive cmyk jpeg": (
        *((200,), lambda: encode(Image.new("CMYK", (6000, 4000)), "JPEG", progressive=True)),
    ),
    "64 Mpx progressive jpeg": (
        *((200,), lambda: encode(Image.new("RGB", (8000, 8000)), "JPEG", progressive=True)),
    ),
    "144 Mpx progressive jpeg": (
        *((413,), lambda: encode(Image.new("RGB", (12000, 12000)), "JPEG", progressive=True)),
    ),
}
NAMES = {
    "path-like": "../../../etc/passwd",
    "windows path": "..\\..\\boot.ini",
    "absolute": "/etc/passwd",
    "huge": "x" * 50_000 + ".jpg",
    "unicode": "ünï côde & 食べ物 (1).JPG",
    "quotes and a tag": "<img src=x onerror=alert(1)>'\".jpg",
    "none of an extension": "photo",
}


def ask(client: Any, data: bytes, name: str = "photo.jpg") -> Any:
    return client.post("/api/v1/predict", files={"file": (name, data, "image/jpeg")})


def check(response: Any, statuses: tuple[int, ...] | list[int]) -> None:
    assert response.status_code in statuses, response.text
    answer = response.json()
    if response.status_code == 200:
        assert 0 <= answer["confidence"] <= 1
    else:
        assert set(answer) == {"code", "detail", "request_id"}


@pytest.fixture(scope="module")
def client(model_dir: Path) -> Iterator[TestClient]:
    app = create_app(Settings(model_dir=model_dir, workers=2))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("name", NAMES)
def test_the_file_name_does_not_matter(name: str, client: TestClient) -> None:
    response = ask(client, encode(plate(), "JPEG"), NAMES[name])
    check(response, [400] if name == "huge" else [200])  # 50 kB are no header any more
    assert NAMES[name] not in response.text


MODES = {
    **{"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGBA", "P", "I;16"), "GIF": ("P",)},
    **{"WEBP": ("RGB",), "AVIF": ("RGB",)},
}
VALID = [encode(plate((48, 32), mode), form) for form, modes in MODES.items() for mode in modes]


@settings(max_examples=200, deadline=None)
@given(
    data=st.sampled_from([*VALID, exif_of_every_kind()]),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
    kept=st.floats(0.3, 1),
)
def test_a_damaged_picture_is_never_our_error(
    client: TestClient, data: bytes, changes: list[tuple[float, int]], kept: float
) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(damaged))] = value
    check(ask(client, bytes(damaged[: int(kept * len(damaged))])), [200, 400, 413, 415])


def test_a_damaged_avif_is_never_our_error(client: TestClient) -> None:
    """Its decoder raises errors of other kinds than those of the other formats."""
    avif = encode(plate((48, 32)), "AVIF")
    for place in range(0, len(avif), 3):
        check(ask(client, avif[:place] + b"\xff" + avif[place + 1 :]), [200, 400, 413, 415])


# A real server --------------------------------------------------------------------------------


@dataclass
class Server:
    """A server process as the documentation starts it, and its log."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def memory(self, field: str) -> int:
        """VmRSS (now) or VmHWM (highest since `forget_peak`), in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"{field}:\s+(\d+) kB", status)
        assert match
        return int(match[1]) * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextmanager
def running_server(model_dir: Path, log: Path) -> Iterator[Server]:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, whose /proc tells what a process took")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(port)]
    command += ["--no-access-log", "--timeout-graceful-shutdown", "2"]
    environment = {**os.environ, "NUTRILEARN_MODEL_DIR": str(model_dir), "NUTRILEARN_WORKERS": "2"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=BACKEND, env=environment, stdout=output, stderr=output
        )
    server = Server(process, port, log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if httpx2.get(f"{server.url}/ready").is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()}")


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(model_dir, tmp_path_factory.mktemp("server") / "log") as server:
        with httpx2.Client(base_url=server.url) as client:
            for form in ("JPEG", "PNG", "WEBP", "AVIF"):  # what decoders load once is no growth
                check(ask(client, encode(plate(), form)), [200])
        yield server


def ask_measured(server: Server, data: bytes, statuses: tuple[int, ...] | list[int]) -> None:
    """Ask, check the answer, and that it cost less than 300 MB at any moment."""
    server.forget_peak()
    before = server.memory("VmRSS")
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        check(ask(client, data), statuses)
    growth = (server.memory("VmHWM") - before) / MEGABYTE
    assert growth < 300, f"grew by {growth:.0f} MB"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, server: Server) -> None:
    statuses, make = HOSTILE[name]
    ask_measured(server, make(), statuses)


def test_the_collection_of_awkward_uploads(server: Server, shared_dir: Path) -> None:
    folder = shared_dir / "data" / "odd_images"
    cases = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert len(cases) == 56
    for case in cases:
        ask_measured(server, (folder / case["name"]).read_bytes(), case["expect"])


# Slow clients ---------------------------------------------------------------------------------


def start_dripping(server: Server) -> socket.socket:
    """A connection that announced 1 MB and has sent a few bytes of it."""
    drip = socket.create_connection(("127.0.0.1", server.port))
    head = "POST /api/v1/predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
    drip.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode())
    return drip


def test_dripping_uploads_hold_up_nobody_and_not_the_end(server: Server) -> None:
    """The last test of this file, as it ends the server."""
    drips = [start_dripping(server) for _ in range(50)]
    with httpx2.Client(base_url=server.url, timeout=30) as client:
        for drip in drips:
            drip.sendall(b"x")
        check(ask(client, encode(plate(), "JPEG")), [200])
        assert client.get("/health").is_success
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(15)  # with --timeout-graceful-shutdown 2
    for drip in drips:
        drip.close()
    assert "Application shutdown complete" in server.log.read_text()
