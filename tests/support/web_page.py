"""The web page in a real Chromium: a server to open it from, and what a person does there."""

import io
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

from app.main import create_app
from app.settings import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IN_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)"),
]
DISHES = ["apple_pie", "baklava", "paneer_butter_masala", "waffles"]
Open = Callable[..., Any]


@contextmanager
def server(model_dir: Path, port: int | None = None, **settings: Any) -> Iterator[str]:
    """The app on a port of this machine, a free one if none is given, in a thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = port or free.getsockname()[1]
    app = create_app(Settings(model_dir=model_dir, workers=2, **settings))
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        running.should_exit = True
        thread.join()


def install_onnxruntime_web(folder: Path) -> Path:
    """Install npm's onnxruntime-web into a folder; skips where that is impossible."""
    if not shutil.which("npm"):
        pytest.skip("needs npm (Debian's package npm)")
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "onnxruntime-web"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"npm cannot install onnxruntime-web: {installed.stderr.splitlines()[-1:]}")
    return folder / "node_modules" / "onnxruntime-web" / "dist"


def photo(red: int = 0) -> bytes:
    image = Image.radial_gradient("L").resize((300, 200)).convert("RGB")
    image.paste((red * 9, 0, 0), (0, 0, 60, 40))
    image.save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def upload(page: Any, data: bytes, name: str = "lunch.jpg") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/jpeg", "buffer": data})


def answered(page: Any) -> str:
    """Waits for the answer and gives the dish it names."""
    page.wait_for_selector("#result:visible")
    food: str = page.inner_text("#food")
    return food
