"""A server as it is run: uvicorn in a process of its own, on a free port of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKEND = Path(__file__).resolve().parents[2] / "backend"


@dataclass
class LiveServer:
    """A running server; its standard output and error are in `log`."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[dict[str, Any]]:
        """The log; fails where a line is not JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def line_of(self, request_id: str) -> dict[str, Any]:
        """The line of a request; it is written after the answer was sent."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            # The last line may be half written.
            for line in self.log.read_text().splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line).get("request_id") == request_id:
                    return dict(json.loads(line))
            time.sleep(0.01)
        raise AssertionError(f"no line of {request_id}:\n{self.log.read_text()}")

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        self.process.wait(60)


@contextmanager
def live_server(
    model_dir: Path, log: Path, *options: str, group: Path | None = None, **environment: str
) -> Iterator[LiveServer]:
    """Start the documented command, and wait until it listens; group: a CPU group to join."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(port)]
    command += ["--no-access-log", *options]
    if group:
        command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
    values = {**os.environ, "NUTRILEARN_MODEL_DIR": str(model_dir), **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=BACKEND, env=values, stdout=output, stderr=output)
    try:
        _wait_until_it_listens(process, port, log)
        yield LiveServer(process, port, log)
    finally:
        process.kill()
        process.wait()


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
