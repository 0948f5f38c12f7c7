"""The report page in a real Chromium: its matrix is drawn whatever the number of classes."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.pages import make_run

from training.release.report import write_report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright, which drives Chromium"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)"),
]
LARGEST_CANVAS = 4096  # pixels a side that every browser draws, phones included
COLORS = """canvas => {
  const { width, height } = canvas, context = canvas.getContext("2d");
  const pixels = context.getImageData(0, 0, width, height).data;
  let green = 0, orange = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    green += pixels[i + 1] - pixels[i] > 40; orange += pixels[i] - pixels[i + 2] > 40;
  }
  return [width, height, green, orange];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[7, 101, 2000])
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_report(
        folder / "report.html",
        **make_run(folder, [f"dish_{i}" for i in range(request.param)], per_class=5),
    )
    return folder / "report.html"


@pytest.mark.parametrize("scale", [1, 3])
def test_the_matrix_is_drawn_at_every_size(browser: Any, page_file: Path, scale: int) -> None:
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, device_scale_factor=scale
    )
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(page_file.as_uri())
    canvas, note = page.locator("#matrix canvas"), page.locator("#matrix-note")
    num_classes = page.locator("#one-class option").count()
    for _ in range(3):
        width, height, green, orange = canvas.evaluate(COLORS)
        assert max(width, height) <= LARGEST_CANVAS
        assert green > 300 and orange > 100
        page.locator("#smaller").click(click_count=9)
    assert note.is_visible() == (num_classes > 101)
    page.locator("#larger").click(click_count=40)
    assert not note.is_visible()
    page.select_option("#order", "together")
    page.evaluate("matrix.scrollTo(400, 400)")
    page.wait_for_timeout(100)
    assert sum(canvas.evaluate(COLORS)[2:]) > 500
    context.close()
    assert not errors


def test_cells_and_classes_are_told_in_words(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, ["apple_pie", "dal", "dosa", "idli", "jalebi", "pho", "ramen"])
    write_report(tmp_path / "report.html", **run)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    counts = np.array(run["results"]["confusion_matrix"])
    page.focus("#matrix")
    for key in ("ArrowDown", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    amount = f"{counts[1, 1]} of 6 ({100 * counts[1, 1] / 6:.0f}%)"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#readout") == f"dal recognized: {amount}"
    page.keyboard.press("Enter")
    assert page.input_value("#one-class") == "dal"
    listed = page.locator("#one-class-list li").all_inner_texts()
    assert len(listed) == 1 + np.count_nonzero(np.delete(counts[1], 1)) + np.count_nonzero(
        np.delete(counts[:, 1], 1)
    )
    assert listed[0].split("\n") == ["recognized", f"{counts[1, 1]} of 6"]
    context.close()


def test_paper_shows_the_whole_matrix(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    width, height, green, _ = page.locator("#matrix canvas").evaluate(COLORS)
    assert width == height <= LARGEST_CANVAS and green > 500
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.locator("#matrix canvas").evaluate(COLORS)[2] > 500
    page.close()
