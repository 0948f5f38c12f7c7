"""The page in a real Chromium: choose, drop, paste, keyboard, portion, correction, errors."""

import base64
import io
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.support.released import release_model
from tests.support.web_page import DISHES, IN_A_BROWSER, Open, answered, photo, server, upload

from app.ml.artifacts import Decision

expect = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright, which drives Chromium"
).expect
pytestmark = IN_A_BROWSER


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    release_model(folder, DISHES, decision=Decision(1.0, confident_at=1.1, food_at=-1.0))
    with server(folder) as url:
        yield url


def pressed(page: Any) -> str:
    name: str = page.inner_text("#guesses [aria-pressed=true] .text")
    return name


def test_a_chosen_photo_is_answered(visit: Open, url: str) -> None:
    page = visit(url)
    upload(page, photo())
    assert answered(page) == pressed(page)
    assert page.inner_text("#verdict").startswith("Not sure")
    assert page.locator("#guesses li").count() == 3
    assert page.locator("#preview").is_visible()
    assert "Model version 1 (PyTorch), 4 dishes" in page.inner_text("footer")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_dropped_or_pasted_photo_is_answered(way: str, visit: Open, url: str) -> None:
    page = visit(url)
    page.evaluate(
        """([way, data]) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "lunch.jpg", { type: "image/jpeg" }));
            const options = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(way === "drop"
                ? new DragEvent("drop", { ...options, dataTransfer: transfer })
                : new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
        }""",
        [way, base64.b64encode(photo()).decode()],
    )
    assert answered(page)


def counted_answers(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}metrics", timeout=20) as metrics:
        lines: list[str] = metrics.read().decode().splitlines()
    return [line for line in lines if line.startswith("nutrilearn_confidence_count")]


def test_where_it_looked_is_drawn_over_the_photo_and_taken_away(visit: Open, url: str) -> None:
    page = visit(url)
    upload(page, photo())
    answered(page)
    plain, counted = page.get_attribute("#preview", "src"), counted_answers(url)
    page.click("#where")
    loaded = {"timeout": 30_000}  # the plain network, for the first time
    expect(page.locator("#where")).to_have_text("Show the photo again", **loaded)
    assert counted_answers(url) == counted  # it is the same photo
    assert page.get_attribute("#preview", "src") != plain
    assert page.inner_text("#where-words").startswith("Bright: what speaks for")
    page.click("#where")
    expect(page.locator("#where")).to_have_text("Where did it look?")
    page.click("#where")
    expect(page.locator("#where")).to_have_attribute("aria-pressed", "true")
    upload(page, photo(3))  # a new photo comes without it
    expect(page.locator("#where")).to_have_attribute("aria-pressed", "false")


# What the page sends -------------------------------------------------------------------------

REMEMBER_WHAT_IS_SENT = """() => {
    const original = window.fetch;
    window.sent = new Promise((remember) => {
        window.fetch = async (url, options) => {
            const file = options?.body?.get?.("file");
            if (file) {
                const bytes = new Uint8Array(await file.arrayBuffer());
                remember({ type: file.type, name: file.name, bytes: Array.from(bytes) });
            }
            return original(url, options);
        };
        setTimeout(remember, 20_000, null);
    });
}"""


def sent_file(page: Any) -> dict[str, Any]:
    """Waits for the file; the page's own policy forbids playwright's wait_for_function."""
    sent: dict[str, Any] = page.evaluate("window.sent")
    assert sent, "nothing was sent"
    return sent


def sent_image(page: Any) -> tuple[str, Image.Image]:
    sent = sent_file(page)
    return sent["type"], Image.open(io.BytesIO(bytes(sent["bytes"])))


def large_photo(form: str, mode: str = "RGB", **options: Any) -> bytes:
    """4000x3000, its left upper quarter red and the rest transparent, where that is possible."""
    image = Image.new(mode, (4000, 3000), (0, 0, 0, 0) if mode == "RGBA" else (255, 255, 255))
    image.paste("red", (0, 0, 2000, 1500))
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def test_a_large_photo_is_made_smaller_first(visit: Open, url: str) -> None:
    page = visit(url)
    page.evaluate(REMEMBER_WHAT_IS_SENT)
    upload(page, large_photo("JPEG"))
    assert answered(page)
    kind, image = sent_image(page)
    assert (kind, image.format, image.size) == ("image/jpeg", "JPEG", (1600, 1200))
    assert image.getpixel((10, 10))[0] > 200 > 50 > image.getpixel((10, 10))[1]  # type: ignore[index]


def test_a_photo_taken_upright_is_sent_upright(visit: Open, url: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise to be upright
    page = visit(url)
    page.evaluate(REMEMBER_WHAT_IS_SENT)
    upload(page, large_photo("JPEG", exif=exif))
    assert answered(page)
    _, image = sent_image(page)
    assert image.size == (1200, 1600)
    assert 0x0112 not in image.getexif()
    corners = [image.getpixel(place)[1] < 128 for place in ((10, 10), (1190, 10))]  # type: ignore[index]
    assert corners == [False, True]  # the red corner is at the right now


def test_what_is_transparent_becomes_white(visit: Open, url: str) -> None:
    page = visit(url)
    page.evaluate(REMEMBER_WHAT_IS_SENT)
    upload(page, large_photo("PNG", "RGBA"), "plate.png")
    assert answered(page)
    _, image = sent_image(page)
    assert min(image.getpixel((1500, 1100))) > 240  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [photo(), b"a picture that no browser can show"], ids=["s", "x"])
def test_what_is_small_or_unknown_is_sent_as_it_is(data: bytes, visit: Open, url: str) -> None:
    page = visit(url)
    page.evaluate(REMEMBER_WHAT_IS_SENT)
    upload(page, data)
    assert bytes(sent_file(page)["bytes"]) == data


@pytest.mark.parametrize(
    ("status", "body", "words", "retry"),
    [
        (413, "<html>413 Request Entity Too Large</html>", "too large", False),
        (502, "<html>502 Bad Gateway</html>", "being restarted", True),
        (504, "", "did not answer in time", True),
        (418, "tea", "the server answered 418", False),
        (429, '{"code": "overloaded"}', "Many photos are waiting", True),
        (503, '{"code": "stopping"}', "being restarted", True),
        (408, '{"code": "upload_too_slow"}', "took too long", True),
        (400, '{"code": "unreadable_image"}', "damaged or incomplete", False),
        (400, '{"code": "malformed_request"}', "did not arrive in one piece", True),
        (422, '{"code": "invalid_request", "detail": "no file"}', "no file", False),
        (500, '{"code": "internal_error"}', "Something went wrong on the server", True),
    ],
)
def test_every_refusal_is_explained(
    status: int, body: str, words: str, retry: bool, visit: Open, url: str
) -> None:
    page = visit(url)
    page.route("**/api/v1/predict", lambda route: route.fulfill(status=status, body=body))
    upload(page, photo())
    page.wait_for_selector("#error:visible")
    assert words in page.inner_text("#error")
    assert page.locator("#retry").is_visible() == retry


def test_the_portion_scales_everything_but_the_100_g(visit: Open, url: str) -> None:
    page = visit(url)
    upload(page, photo())
    answered(page)
    page.select_option("#other", "apple_pie")  # 296 kcal per 100 g, 150 g a serving
    expect(page.locator("#food")).to_have_text("Apple Pie")
    assert page.inner_text("#calories") == "444"
    assert "usual serving" in page.inner_text("#portion-words")
    page.locator("#portion").fill("300")
    assert page.inner_text("#calories") == "888"
    assert page.inner_text("#grams") == "300 g"
    assert page.inner_text("#nutrients tr >> nth=0").split("\t")[1:] == ["888 kcal", "296 kcal"]
    assert "USDA FNDDS" in page.inner_text("#source")


def test_a_dish_without_a_source_shows_no_numbers(visit: Open, url: str) -> None:
    page = visit(url)
    upload(page, photo())
    answered(page)
    page.select_option("#other", "paneer_butter_masala")
    page.wait_for_selector("#no-nutrition:visible")
    assert "no sourced nutrition for Paneer Butter Masala" in page.inner_text("#no-nutrition")
    assert not page.locator("#nutrition").is_visible()


def test_everything_works_by_keyboard(visit: Open, url: str) -> None:
    page = visit(url)
    file = {"name": "lunch.jpg", "mimeType": "image/jpeg", "buffer": photo()}
    page.on("filechooser", lambda chooser: chooser.set_files(file))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    page.keyboard.press("Enter")
    answered(page)
    assert page.evaluate("document.activeElement.id") == "result"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    second = page.locator("#guesses button >> nth=1")
    assert second.evaluate("node => node === document.activeElement")
    page.keyboard.press("Enter")
    expect(page.locator("#verdict")).to_have_text("Your choice")
    assert pressed(page) == page.inner_text("#food")


def test_corrections_are_kept_only_with_consent(visit: Open, url: str) -> None:
    page = visit(url)
    stored = "localStorage.getItem('nutrilearn-corrections')"
    upload(page, photo())
    answered(page)
    page.click("#guesses button >> nth=1")
    expect(page.locator("#verdict")).to_have_text("Your choice")
    assert page.evaluate(stored) is None
    page.check("#consent")
    kept = page.evaluate(f"JSON.parse({stored})")
    assert len(kept) == 1
    assert kept[0]["predicted"] != kept[0]["corrected"]
    assert "1 kept in this browser" in page.inner_text("#kept")
    page.click("#forget")
    assert page.evaluate(stored) is None


def test_a_file_that_is_no_photo_is_explained(visit: Open, url: str) -> None:
    page = visit(url)
    upload(page, b"<html><script>alert(1)</script></html>")
    page.wait_for_selector("#error:visible")
    assert "not a picture I can read" in page.inner_text("#error")
    assert not page.locator("#retry").is_visible()
    upload(page, photo())
    assert answered(page)


def test_a_server_that_is_gone_is_explained(visit: Open, url: str) -> None:
    page = visit(url)
    page.context.set_offline(True)
    upload(page, photo())
    page.wait_for_selector("#retry:visible")
    assert "could not be reached" in page.inner_text("#error")
    page.context.set_offline(False)
    page.click("#retry")
    assert answered(page)


def test_without_a_model_the_page_says_how_to_get_one(visit: Open, tmp_path: Path) -> None:
    with server(tmp_path) as url:
        page = visit(url)
        page.wait_for_selector("#banner:visible")
        assert "python backend/train_model.py --sample" in page.inner_text("#banner")
        upload(page, photo())
        page.wait_for_selector("#error:visible")
        assert "no trained model" in page.inner_text("#error")


def test_what_is_no_dish_gets_no_calories(visit: Open, tmp_path: Path) -> None:
    release_model(tmp_path, DISHES, decision=Decision(1.0, 0.0, food_at=100.0))
    with server(tmp_path) as url:
        page = visit(url)
        upload(page, photo())
        assert answered(page) == "No dish found"
        assert "not look like a dish" in page.inner_text("#verdict")
        assert not page.locator("#nutrition").is_visible()


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits(width: int, scheme: str, visit: Open, url: str) -> None:
    page = visit(url, viewport={"width": width, "height": 800}, color_scheme=scheme)
    upload(page, photo())
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    luminance = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (sum(luminance) > 384) == (scheme == "light")
