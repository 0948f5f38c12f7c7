"""From wrong answers to a better model: a browser, a server and the commands, as people use them.

    python -m tests.torture.feedback_loop --data_dir FOLDER --weights FILE --dishes DISHES \\
        --new dosa,pani_puri

Trains version 1 on FOLDER and serves it. A browser sends photos of dishes that it does not know
(DISHES has a folder for each), an operator accepts them in the browser too, and version 2 is
trained from version 1 and what was accepted. It is compared, promoted, taken back and promoted
again, while clients keep asking. The last photos of each new dish are held back, to test with.
Printed are the commands as typed, what they took, the accuracy on known and new dishes before and
after, and the requests that failed. The exit code is 1 if one did.
"""

import argparse
import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "backend"))

from tests.support.live_server import live_server
from tests.support.web_page import CHROMIUM

from app.ml.predictor import load_model_for_inference
from training.release.promotion import images_of_both, read_test

TOKEN = "a-token-for-one-evening"
CLIENTS = 2
LONGEST_SECONDS = 3600  # of one command; longer means that it hangs


class Evening:
    """The folders of one run of this script, and what its commands took."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.models, self.feedback = folder / "ml-models", folder / "feedback"
        self.folder = folder
        self.new: list[str] = options.new.split(",")
        self.seconds: dict[str, float] = {}

    def run(self, name: str, *flags: str) -> None:
        """Run the training script, with its own words shown as they come."""
        arguments = ["--output_dir", str(self.models), *flags]
        print(f"\n$ python backend/train_model.py {' '.join(arguments)}", flush=True)
        began = time.perf_counter()
        command = [sys.executable, str(ROOT / "backend" / "train_model.py"), *arguments]
        subprocess.run(command, check=True, timeout=LONGEST_SECONDS)
        self.took(name, began)

    def train(self, name: str, *flags: str) -> None:
        places = ("--checkpoint_dir", str(self.folder / "checkpoints"), "--no_mlflow")
        more = self.options.flags.split()
        self.run(name, "--data_dir", self.options.data_dir, *places, *more, *flags)

    def took(self, name: str, began: float) -> None:
        self.seconds[name] = time.perf_counter() - began

    def photos(self, dish: str) -> tuple[list[Path], list[Path]]:
        """The photos of a new dish: those to send, and those held back."""
        found = sorted(path for path in (Path(self.options.dishes) / dish).iterdir())
        at = len(found) - self.options.held_back
        return found[:at], found[at:]


# In the browser -------------------------------------------------------------------------------


def correct_answers(evening: Evening, browser: Any, url: str) -> int:
    """Ask about each photo, see that the answer is wrong, and send the right dish."""
    from playwright.sync_api import expect

    page, count = browser.new_page(), 0
    page.set_default_timeout(60_000)
    page.goto(url)
    for dish in evening.new:
        for path in evening.photos(dish)[0]:
            page.set_input_files("#file", str(path))
            page.wait_for_selector("#result:visible")
            page.check("#share")
            page.fill("#dish", dish.replace("_", " "))
            page.click("#name-dish button")
            expect(page.locator("#taught")).to_contain_text("Thank you", timeout=60_000)
            count += 1
    return count


def accept_all(browser: Any, url: str) -> int:
    """Accept what waits, card by card, as the operator."""
    from playwright.sync_api import expect

    page, count = browser.new_page(), 0
    page.set_default_timeout(60_000)
    page.goto(f"{url}/review")
    page.fill("#token", TOKEN)
    page.click("#sign-in button")
    status = page.locator("#count")
    expect(status).not_to_be_empty(timeout=60_000)
    while (words := status.inner_text()) != "Nothing here.":
        page.locator("#queue button", has_text="Accept").first.click()
        expect(status).not_to_have_text(words, timeout=60_000)
        count += 1
    return count


# While it is promoted -------------------------------------------------------------------------


class Clients:
    """People who keep asking; `answers` counts (status or error, model version)."""

    def __init__(self, url: str, photo: bytes) -> None:
        self.url, self.photo = url, photo
        self.answers: Counter[tuple[str, str]] = Counter()
        self.version = ""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def _ask(self) -> None:
        with httpx2.Client(timeout=60) as client:
            while not self._stop.is_set():
                try:
                    files = {"file": ("lunch.jpg", io.BytesIO(self.photo))}
                    response = client.post(f"{self.url}/api/v1/predict", files=files)
                except httpx2.HTTPError as error:
                    self.answers[(type(error).__name__, "")] += 1
                    continue
                self.version = response.headers.get("x-model-version", "")
                self.answers[(str(response.status_code), self.version)] += 1

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(120)

    def wait_for(self, version: int) -> None:
        wait(lambda: self.version == str(version), f"nobody was answered by version {version}")


def wait(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(complaint)
        time.sleep(0.05)


# What came of it ------------------------------------------------------------------------------


def new_dishes_right(evening: Evening, version: int) -> tuple[int, int]:
    """Of the photos that were held back: how many a version names, and how many there are."""
    model = load_model_for_inference(evening.models, version)
    answers = [
        model.predict(path).top[0].class_name == dish
        for dish in evening.new
        for path in evening.photos(dish)[1]
    ]
    return sum(answers), len(answers)


def report(evening: Evening, clients: Clients) -> int:
    tests = [read_test(evening.models, version) for version in (1, 2)]
    paths = images_of_both(*tests)
    print("\n|  | version 1 | version 2 |\n|---|---|---|")
    known = [sum(test.answers[path].correct for path in paths) / len(paths) for test in tests]
    print(f"| known dishes, {len(paths)} test photos | {known[0]:.3f} | {known[1]:.3f} |")
    new = [new_dishes_right(evening, version) for version in (1, 2)]
    shares = " | ".join(f"{right / count:.3f}" for right, count in new)
    print(f"| new dishes, {new[0][1]} photos held back | {shares} |")
    for name, seconds in evening.seconds.items():
        print(f"{name}: {seconds:.1f} s")
    failed = sum(n for (status, _), n in clients.answers.items() if status != "200")
    versions = {
        version: sum(n for (_, v), n in clients.answers.items() if v == version)
        for version in ("1", "2")
    }
    print(f"requests while promoting: {clients.answers.total()}, by version {versions}")
    print(f"requests failed: {failed}")
    return 1 if failed else 0


def play(evening: Evening) -> int:
    from playwright.sync_api import sync_playwright

    options = evening.options
    evening.train(
        "training version 1", "--weights", options.weights, "--epochs", str(options.epochs)
    )
    settings = {
        "NUTRILEARN_FEEDBACK_DIR": str(evening.feedback),
        "NUTRILEARN_RELOAD_TOKEN": TOKEN,
        "NUTRILEARN_RELOAD_POLL_SECONDS": "1",
        "NUTRILEARN_FEEDBACK_PER_MINUTE": "100000",
    }
    with (
        live_server(evening.models, evening.folder / "server.log", **settings) as server,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        began = time.perf_counter()
        count = correct_answers(evening, browser, server.url)
        evening.took(f"correcting {count} answers in the browser", began)
        began = time.perf_counter()
        evening.took(f"accepting {accept_all(browser, server.url)} of them", began)
        browser.close()
        custom = ("--custom_data_dir", str(evening.feedback), "--weights", "v1", "--no_promote")
        evening.train("training version 2", *custom, "--epochs", str(options.more_epochs))
        evening.run("comparing", "--compare", "v1", "v2")
        clients = Clients(server.url, evening.photos(evening.new[0])[1][0].read_bytes())
        with clients.asking():
            clients.wait_for(1)
            for name, version in (("promoting", 2), ("going back", 1), ("and forth", 2)):
                began = time.perf_counter()
                evening.run(name, "--promote", f"v{version}")
                clients.wait_for(version)
                evening.took(f"{name}, until it answers", began)
    return report(evening, clients)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", required=True, help="photos of the known dishes")
    parser.add_argument("--weights", required=True, help="what version 1 starts from")
    parser.add_argument("--dishes", required=True, help="a folder for each new dish")
    parser.add_argument("--new", required=True, help="the new dishes: a,b")
    parser.add_argument("--epochs", type=int, default=10, help="of version 1 (10)")
    parser.add_argument("--more_epochs", type=int, default=5, help="of version 2 (5)")
    parser.add_argument("--held_back", type=int, default=15, help="photos to test a new dish (15)")
    parser.add_argument("--flags", default="", help="more flags of both trainings, in quotes")
    parser.add_argument("--keep", help="keep models, corrections and logs in this folder")
    options = parser.parse_args()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="nutrilearn-evening-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return play(Evening(options, folder))
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
