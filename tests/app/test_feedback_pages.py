"""Corrections in a real Chromium: consent, sending, taking back, and the operator's review."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.released import release_model
from tests.support.web_page import DISHES, IN_A_BROWSER, Open, answered, photo, server, upload

from app.ml.artifacts import Decision

expect = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright, which drives Chromium"
).expect
pytestmark = IN_A_BROWSER
TOKEN = "a-token-of-sixteen-or-more"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    models = folder / "models"
    release_model(models, DISHES, decision=Decision(1.0, confident_at=1.1, food_at=-1.0))
    with server(models, feedback_dir=folder / "sent", reload_token=TOKEN) as url:
        yield url


@pytest.fixture
def stored(folder: Path) -> Iterator[Path]:
    """The folder of corrections, emptied afterwards."""
    yield folder / "sent"
    for path in (folder / "sent").rglob("*"):
        if path.is_file():
            path.unlink()


def photos(stored: Path) -> list[str]:
    found = (path.relative_to(stored).parent.as_posix() for path in stored.rglob("*.jpg"))
    return sorted(found)


def asked_about(visit: Open, url: str, **options: Any) -> Any:
    page = visit(url, **options)
    upload(page, photo(), "jane-at-home.jpg")
    answered(page)
    return page


def sign_in(visit: Open, url: str, token: str = TOKEN) -> Any:
    page = visit(f"{url}review")
    page.fill("#token", token)
    page.click("#sign-in button")
    return page


# People ---------------------------------------------------------------------------------------


def test_without_consent_nothing_is_sent(visit: Open, url: str, stored: Path) -> None:
    page = visit(url)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    upload(page, photo())
    answered(page)
    assert not page.is_checked("#share")
    assert not page.locator("#name-dish").is_visible()
    page.select_option("#other", "baklava")
    expect(page.locator("#verdict")).to_have_text("Your choice")
    assert not [url for url in sent if "feedback" in url]
    assert photos(stored) == []
    assert "unless you agree" in page.inner_text("#privacy")


def test_a_correction_is_kept_once_agreed_to_and_deleted_when_asked(
    visit: Open, url: str, stored: Path
) -> None:
    page = asked_about(visit, url)
    page.check("#share")
    page.select_option("#other", "baklava")
    expect(page.locator("#taught")).to_have_text("Thank you. Your photo is kept as Baklava.")
    expect(page.locator("#sent span")).to_have_text("1 photo of yours is kept on the server.")
    assert photos(stored) == [".pending/baklava"]
    (record,) = (path.read_text() for path in (stored / ".records").glob("*.json"))
    assert json.loads(record)["answer"]["model_version"] == 1
    assert "jane" not in record
    page.select_option("#other", "waffles")  # a second thought
    expect(page.locator("#taught")).to_have_text("Thank you. Your photo is kept as Waffles.")
    assert photos(stored) == [".pending/waffles"]
    page.click("#take-back")
    expect(page.locator("#taught")).to_have_text("Deleted from the server.")
    assert photos(stored) == []
    assert not page.locator("#sent").is_visible()


def test_agreeing_after_the_choice_sends_it(visit: Open, url: str, stored: Path) -> None:
    page = asked_about(visit, url)
    page.select_option("#other", "baklava")
    expect(page.locator("#verdict")).to_have_text("Your choice")
    page.check("#share")
    expect(page.locator("#taught")).to_be_visible()
    assert photos(stored) == [".pending/baklava"]


def test_a_dish_that_is_not_in_the_list_can_be_named(visit: Open, url: str, stored: Path) -> None:
    page = asked_about(visit, url)
    page.check("#share")
    page.fill("#dish", "Dal Makhani")
    page.keyboard.press("Enter")
    expect(page.locator("#taught")).to_have_text("Thank you. Your photo is kept as Dal Makhani.")
    assert photos(stored) == [".pending/_new/dal_makhani"]
    page.fill("#dish", "../../etc")
    page.click("#name-dish button")
    expect(page.locator("#taught")).to_contain_text("cannot be the name of a dish")
    assert photos(stored) == [".pending/_new/dal_makhani"]


def test_consent_is_asked_once_and_can_be_revoked(visit: Open, url: str, stored: Path) -> None:
    page = asked_about(visit, url)
    page.check("#share")
    page.reload()
    upload(page, photo())
    answered(page)
    assert page.is_checked("#share")
    page.uncheck("#share")
    page.select_option("#other", "baklava")
    expect(page.locator("#verdict")).to_have_text("Your choice")
    assert photos(stored) == []
    page.reload()
    upload(page, photo())
    answered(page)
    assert not page.is_checked("#share")


def test_a_correction_survives_that_the_answer_was_forgotten(
    visit: Open, url: str, stored: Path
) -> None:
    page = asked_about(visit, url)
    page.check("#share")
    page.route("**/api/v1/feedback", answer_forgotten())
    page.select_option("#other", "baklava")
    expect(page.locator("#taught")).to_contain_text("Thank you")
    assert photos(stored) == [".pending/baklava"]


def answer_forgotten() -> Any:
    """Answers as a server does that was restarted, as long as an id is sent."""

    def handle(route: Any) -> None:
        if b'name="request_id"' in (route.request.post_data_buffer or b""):
            body = {"code": "unknown_answer", "detail": "", "request_id": "x"}
            route.fulfill(status=404, json=body)
        else:
            route.continue_()

    return handle


def test_a_refusal_is_said_beside_the_answer(visit: Open, url: str, stored: Path) -> None:
    page = asked_about(visit, url)
    page.route(
        "**/api/v1/feedback", lambda r: r.fulfill(status=507, json={"code": "feedback_full"})
    )
    page.check("#share")
    page.select_option("#other", "baklava")
    expect(page.locator("#taught")).to_contain_text("no room")
    assert page.locator("#result").is_visible()
    assert photos(stored) == []


def test_without_a_folder_nothing_is_offered(visit: Open, tmp_path: Path) -> None:
    release_model(tmp_path, DISHES)
    with server(tmp_path) as url:
        page = asked_about(visit, url)
        assert not page.locator("#teach").is_visible()
        assert page.locator("#local").is_visible()
        assert page.inner_text("#privacy") == "Your photo is not stored on the server."


# The operator ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_operator_accepts_relabels_and_discards(visit: Open, url: str, stored: Path) -> None:
    for dish in ("waffles", "Dal Makhani", "Pizza"):
        page = visit(url)
        upload(page, photo(len(dish)))
        answered(page)
        page.check("#share")
        if dish == "waffles":
            page.select_option("#other", dish)
        else:
            page.fill("#dish", dish)
            page.click("#name-dish button")
        expect(page.locator("#taught")).to_contain_text("Thank you")
    page = sign_in(visit, url, "not-the-token-of-this-server")
    expect(page.locator("#problem")).to_have_text("This is not the server's reload token.")
    assert page.locator("#queue li").count() == 0
    page.fill("#token", TOKEN)
    page.click("#sign-in button")
    expect(page.locator("#count")).to_have_text("3 waiting")
    assert not page.locator("#sign-in").is_visible()
    cards = {
        name: page.locator("#queue li", has=page.locator("strong", has_text=name))
        for name in ("Waffles", "Dal Makhani", "Pizza")
    }
    expect(cards["Waffles"].locator("img")).to_have_js_property("naturalWidth", 300)
    expect(cards["Dal Makhani"]).to_contain_text("training takes a new dish from 5 on")
    expect(cards["Dal Makhani"]).to_contain_text("Version 1 said")
    cards["Waffles"].locator("button", has_text="Accept").click()
    expect(page.locator("#count")).to_have_text("2 waiting")
    cards["Dal Makhani"].locator("input").fill("Dal Fry")
    cards["Dal Makhani"].locator("button", has_text="Accept").click()
    expect(page.locator("#count")).to_have_text("1 waiting")
    cards["Pizza"].locator("button", has_text="Discard").click()
    expect(page.locator("#count")).to_have_text("Nothing here.")
    assert photos(stored) == ["dal_fry", "waffles"]
    page.click("#accepted")
    expect(page.locator("#count")).to_have_text("2 accepted")
    page.reload()  # the token is kept in this tab
    expect(page.locator("#count")).to_have_text("Nothing here.")


def test_a_name_that_is_refused_leaves_the_photo_waiting(
    visit: Open, url: str, stored: Path
) -> None:
    page = asked_about(visit, url)
    page.check("#share")
    page.select_option("#other", "baklava")
    expect(page.locator("#taught")).to_contain_text("Thank you")
    page = sign_in(visit, url)
    page.fill("#queue input", "../x")
    page.click("#queue button >> nth=0")
    expect(page.locator("#problem")).to_contain_text("cannot be the name of a dish")
    assert photos(stored) == [".pending/baklava"]
    assert page.locator("#queue button >> nth=0").is_enabled()


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_pages_fit(width: int, scheme: str, visit: Open, url: str, stored: Path) -> None:
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    page = asked_about(visit, url, **options)
    page.check("#share")
    page.fill("#dish", "Dal makhani with a rather long name and rice")
    page.click("#name-dish button")
    expect(page.locator("#taught")).to_contain_text("Thank you")
    assert photos(stored)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page = visit(f"{url}review", **options)
    page.fill("#token", TOKEN)
    page.click("#sign-in button")
    expect(page.locator("#count")).to_have_text("1 waiting")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
