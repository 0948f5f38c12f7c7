"""Corrections: what is stored of a photo, who can take it back, and what reaches training."""

import errno
import io
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tests.support.released import release_model

from app.feedback import FeedbackStore, stored_form
from app.main import create_app
from app.settings import Settings
from training.data.folders import Audit
from training.data.sources import load_custom
from training.errors import DataError

TOKEN = "a-token-of-sixteen-or-more"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}
SECRET = "Jane Doe, 12 High Street"
Serve = Callable[..., TestClient]


def photo(color: tuple[int, int, int] = (200, 40, 40), size: tuple[int, int] = (64, 48)) -> bytes:
    Image.new("RGB", size, color).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "feedback"


@pytest.fixture
def serve(model_dir: Path, folder: Path) -> Iterator[Serve]:
    """A server that takes corrections, of a model that knows apple_pie, samosa and jalebi."""
    clients = []

    def start(**options: Any) -> TestClient:
        values = {"model_dir": model_dir, "feedback_dir": folder, "feedback_per_minute": 1000}
        app = create_app(Settings(workers=2, **{**values, "reload_token": TOKEN, **options}))
        clients.append(client := TestClient(app, raise_server_exceptions=False))
        client.__enter__()
        return client

    yield start
    for client in clients:
        client.__exit__()


@pytest.fixture
def client(serve: Serve) -> TestClient:
    return serve()


def send(client: TestClient, data: bytes | None = None, dish: str = "jalebi", **fields: str) -> Any:
    files = {"file": ("holiday-with-jane.png", photo() if data is None else data)}
    form = {"dish": dish, "consent": "true", **fields}
    return client.post("/api/v1/feedback", files=files, data=form)


def delete(client: TestClient, receipt: dict[str, Any], token: str | None = None) -> Any:
    headers = {"Authorization": f"Bearer {receipt['token'] if token is None else token}"}
    return client.delete(f"/api/v1/feedback/{receipt['id']}", headers=headers)


def decide(client: TestClient, id: str, decision: str, **params: str) -> Any:
    return client.post(
        f"/api/v1/review/{id}", params={"decision": decision, **params}, headers=OPERATOR
    )


def listed(client: TestClient, state: str = "pending") -> Any:
    return client.get("/api/v1/review", params={"state": state}, headers=OPERATOR).json()


def files(folder: Path) -> list[str]:
    """Everything below a folder but the lock."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(path for path in found if path != ".lock")


def assert_error(response: Any, status: int, code: str) -> None:
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert set(response.json()) == {"code", "detail", "request_id"}


# What is stored -------------------------------------------------------------------------------


def test_a_correction_waits_beside_a_line_about_it(client: TestClient, folder: Path) -> None:
    asked = client.post("/api/v1/predict", files={"file": photo()})
    sent = send(client, dish="Jalebi", request_id=asked.headers["x-request-id"])
    assert sent.status_code == 201
    receipt = sent.json()
    id = receipt["id"]
    assert files(folder) == [f".pending/jalebi/{id}.jpg", f".records/{id}.json"]
    assert receipt["class_name"] == "jalebi"
    assert (receipt["state"], receipt["is_new"]) == ("pending", False)
    (line,) = (folder / ".records" / f"{id}.json").read_text().splitlines()
    record = json.loads(line)
    answer = asked.json()
    assert record["class_name"] == "jalebi"
    assert record["answer"] == {
        name: answer[name] for name in ("model_version", "class_name", "confidence", "verdict")
    }


def test_nothing_of_the_person_is_stored(client: TestClient, folder: Path) -> None:
    """No EXIF, XMP, comment, text chunk or file name; no address, browser or token."""
    exif = Image.Exif()
    exif[0x013B] = SECRET  # the artist
    exif.get_ifd(0x8825)[2] = (52.0, 30.0, 0.0)  # a place
    image = Image.new("RGB", (300, 200), (9, 90, 200))
    image.save(jpeg := io.BytesIO(), "JPEG", exif=exif, comment=SECRET.encode(), xmp=b"<x/>")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("Author", SECRET)
    Image.new("RGB", (300, 200), (200, 90, 9)).save(png := io.BytesIO(), "PNG", pnginfo=info)
    client.headers["User-Agent"] = SECRET
    for data in (jpeg.getvalue(), png.getvalue()):
        sent = send(client, data, dish="jalebi")
        assert sent.status_code == 201
        with Image.open(folder / ".pending" / "jalebi" / f"{sent.json()['id']}.jpg") as stored:
            assert stored.format == "JPEG"
            assert set(stored.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
            assert not stored.getexif()
    names = " ".join(files(folder)).encode()
    content = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()) + names
    for word in (SECRET, "jane", "testclient", sent.json()["token"], "x-request-id"):
        assert word.encode() not in content


def test_a_photo_is_stored_upright_and_no_larger_than_it_may_be() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (2000, 1500), "white")
    image.paste("red", (0, 0, 1000, 750))
    image.save(buffer := io.BytesIO(), "JPEG", exif=exif)
    with Image.open(io.BytesIO(stored_form(buffer.getvalue()))) as stored:
        assert max(stored.size) <= 1024
        assert stored.height > stored.width
        assert stored.getpixel((stored.width - 5, 5))[1] < 128  # type: ignore[index]
    with Image.open(io.BytesIO(stored_form(photo(size=(1500, 100))))) as stored:
        assert stored.size[0] == 1024


def test_an_unknown_dish_waits_among_the_new_ones(client: TestClient, folder: Path) -> None:
    receipt = send(client, dish=" Pav \u2013 Bhaji ").json()
    assert (receipt["class_name"], receipt["is_new"]) == ("pav_bhaji", True)
    assert f".pending/_new/pav_bhaji/{receipt['id']}.jpg" in files(folder)


def test_the_answer_is_the_servers_own(client: TestClient, folder: Path) -> None:
    """What a client says about the answer is not asked for, and an id that was never given is
    refused."""
    sent = send(client, confidence="0.99", answer="samosa", verdict="confident")
    record = json.loads((folder / ".records" / f"{sent.json()['id']}.json").read_text())
    assert record["answer"] is None
    refused = send(client, photo((1, 2, 3)), request_id="never-given")
    assert_error(refused, 404, "unknown_answer")
    assert "never-given" in refused.json()["detail"]
    assert len(listed(client)["corrections"]) == 1


def test_only_so_many_answers_are_remembered(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.answers.REMEMBERED", 2)
    ids = []
    for number in range(3):
        headers = {"X-Request-ID": f"request-{number}"}
        client.post("/api/v1/predict", files={"file": photo()}, headers=headers)
        ids.append(f"request-{number}")
    assert_error(send(client, request_id=ids[0]), 404, "unknown_answer")
    assert send(client, request_id=ids[2]).status_code == 201


def test_the_same_photo_is_kept_once_under_its_last_name(client: TestClient, folder: Path) -> None:
    first, second = send(client, dish="jalebi"), send(client, dish="samosa")
    assert (first.status_code, second.status_code) == (201, 200)
    id = first.json()["id"]
    assert second.json()["id"] == id
    assert files(folder) == [f".pending/samosa/{id}.jpg", f".records/{id}.json"]


# Consent and taking back ----------------------------------------------------------------------


@pytest.mark.parametrize("consent", ["", "false", "yes", "True"])
def test_nothing_is_stored_without_consent(consent: str, client: TestClient, folder: Path) -> None:
    assert_error(send(client, consent=consent), 422, "invalid_request")
    assert files(folder) == []


def test_deletion_deletes(client: TestClient, folder: Path) -> None:
    receipt = send(client, dish="dosa").json()
    assert delete(client, receipt).status_code == 204
    assert files(folder) == []
    assert_error(delete(client, receipt), 404, "not_found")


def test_deletion_deletes_what_was_accepted_too(client: TestClient, folder: Path) -> None:
    receipt = send(client).json()
    decide(client, receipt["id"], "accept")
    assert delete(client, receipt).status_code == 204
    assert files(folder) == []


def test_only_the_tokens_that_were_given_delete(client: TestClient, folder: Path) -> None:
    receipt, other = send(client).json(), send(client, photo((1, 2, 3))).json()
    before = files(folder)
    for token in ("", "x", other["token"], receipt["token"][:-1], TOKEN):
        assert_error(delete(client, receipt, token), 401, "wrong_token")
    refused = client.delete(f"/api/v1/feedback/{receipt['id']}")
    assert_error(refused, 401, "wrong_token")
    assert files(folder) == before


def test_each_token_of_a_photo_deletes_it(client: TestClient, folder: Path) -> None:
    """The answer with the first may have been lost on its way."""
    first, second = send(client).json(), send(client).json()
    assert first["token"] != second["token"]
    assert delete(client, first).status_code == 204
    assert files(folder) == []


@pytest.mark.parametrize("id", ["0" * 32, "f" * 31, "../../x", "%2e%2e", "A" * 32])
def test_an_id_that_was_never_given_is_not_found(id: str, client: TestClient) -> None:
    for response in (client.delete(f"/api/v1/feedback/{id}"), decide(client, id, "discard")):
        assert response.status_code in (404, 422)
        assert set(response.json()) == {"code", "detail", "request_id"}


# What is refused ------------------------------------------------------------------------------


def test_without_a_folder_it_is_off(serve: Serve, folder: Path) -> None:
    client = serve(feedback_dir=None)
    assert client.get("/api/v1/model").json()["feedback"] is False
    for response in (
        send(client),
        client.delete(f"/api/v1/feedback/{'0' * 32}"),
        client.get("/api/v1/review", headers=OPERATOR),
    ):
        assert_error(response, 404, "not_found")
        assert "NUTRILEARN_FEEDBACK_DIR" in response.json()["detail"]
    assert not folder.exists()
    assert serve().get("/api/v1/model").json()["feedback"] is True


@pytest.mark.parametrize(
    "dish",
    ["", "  ", "../../etc/passwd", "..", "/", "a\\b", "C:dosa", "dal\x00", "x" * 500, "CON", ".."],
)
def test_a_path_is_no_dish(dish: str, client: TestClient, folder: Path) -> None:
    assert_error(send(client, dish=dish), 422, "invalid_request")
    assert files(folder) == []
    assert sorted(path.name for path in folder.parent.iterdir()) == ["feedback"]


@hypothesis_settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(st.sampled_from("ab./\\:_- ~\0\u202eé%"), max_size=12))
def test_no_dish_leads_out_of_the_folder(client: TestClient, folder: Path, dish: str) -> None:
    response = send(client, dish=dish)
    assert response.status_code in (201, 200, 400, 422), response.text
    assert sorted(path.name for path in folder.parent.iterdir()) == ["feedback"]
    for path in (folder / ".pending").rglob("*.jpg"):
        place = path.relative_to(folder / ".pending").parts
        assert len(place) == 2 or (len(place), place[0]) == (3, "_new")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "unreadable_image"),
        (b"text", 415, "unsupported_image"),
        (photo()[:40], 400, "unreadable_image"),
        (photo(size=(4000, 1)), 400, "unreadable_image"),
        (bytes(3 * 2**20), 413, "too_large"),
    ],
    ids=["empty", "text", "cut", "narrow", "large"],
)
def test_a_picture_that_is_refused_elsewhere_is_refused_here(
    data: bytes, status: int, code: str, serve: Serve, folder: Path
) -> None:
    client = serve(max_upload_bytes=2**21)
    assert_error(send(client, data), status, code)
    assert_error(client.post("/api/v1/predict", files={"file": data}), status, code)
    assert files(folder) == []


def test_what_is_no_form_is_refused(client: TestClient) -> None:
    headers = {"Content-Type": "image/png"}
    response = client.post("/api/v1/feedback", content=photo(), headers=headers)
    assert_error(response, 422, "invalid_request")
    assert "consent" in response.json()["detail"]
    without = client.post("/api/v1/feedback", data={"dish": "dosa", "consent": "true"})
    assert_error(without, 422, "invalid_request")
    assert_error(send(client, dish="x" * 2000), 422, "invalid_request")


def test_a_server_without_a_model_stores_nothing(tmp_path: Path, folder: Path) -> None:
    app = create_app(Settings(model_dir=tmp_path / "none", feedback_dir=folder))
    with TestClient(app, raise_server_exceptions=False) as client:
        assert_error(send(client), 503, "no_model")
    assert files(folder) == []


# Limits and faults ----------------------------------------------------------------------------


def test_the_folder_is_bounded_by_count_and_by_bytes(serve: Serve) -> None:
    client = serve(feedback_max_photos=2)
    first = send(client, photo((0, 0, 1))).json()
    send(client, photo((0, 90, 0)))
    full = send(client, photo((200, 0, 0)))
    assert_error(full, 507, "feedback_full")
    assert send(client, photo((0, 90, 0))).status_code == 200  # which is here already
    decide(client, first["id"], "accept")  # makes room
    assert send(client, photo((200, 0, 0))).status_code == 201
    small = serve(feedback_max_bytes=1500)
    assert_error(send(small, photo((7, 200, 7))), 507, "feedback_full")
    assert len(listed(client)["corrections"]) == 2


def test_a_flood_is_slowed_down(serve: Serve) -> None:
    client = serve(feedback_per_minute=5)
    answers = [send(client, photo((0, 0, 10 * n))) for n in range(8)]
    assert [answer.status_code for answer in answers[:5]] == [201] * 5
    for answer in answers[5:]:
        assert_error(answer, 429, "too_many_corrections")
        assert answer.headers["retry-after"] == "60"
    assert client.post("/api/v1/predict", files={"file": photo()}).status_code == 200


def test_the_rate_recovers_and_is_each_clients_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.feedback import RateLimit, TooManyCorrectionsError

    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limit = RateLimit(2)
    for _ in range(2):
        limit.check("a")
    with pytest.raises(TooManyCorrectionsError):
        limit.check("a")
    limit.check("b")
    now = 31.0  # one of two a minute is back
    limit.check("a")
    with pytest.raises(TooManyCorrectionsError):
        limit.check("a")


def test_many_at_once_are_all_kept(client: TestClient, folder: Path) -> None:
    photos = [photo((n * 12, 255 - n * 12, 80)) for n in range(12)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda data: send(client, data), photos * 2))
    assert sorted({answer.status_code for answer in answers}) == [200, 201]
    assert len(files(folder)) == 2 * 12
    assert listed(client)["total"] == 12


FAULTS = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]


@pytest.mark.parametrize("code", FAULTS)
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_or_read_only_disk_is_told_and_leaves_no_half(
    code: int,
    fails_at: int,
    client: TestClient,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first file that is written is the photo, the second its record."""
    kept = send(client, photo((9, 9, 9))).json()
    before, written, fsync = files(folder), 0, os.fsync

    def failing(descriptor: int) -> None:
        nonlocal written
        written += stat.S_ISREG(os.fstat(descriptor).st_mode)
        if written == fails_at:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    refused = send(client)
    assert_error(refused, 507, "feedback_not_stored")
    assert os.strerror(code) in refused.json()["detail"]
    assert str(folder) not in refused.text
    monkeypatch.setattr(os, "fsync", fsync)
    assert files(folder) == before
    assert send(client).status_code == 201
    assert delete(client, kept).status_code == 204


def test_a_folder_that_cannot_be_made_stops_neither_start_nor_answers(
    serve: Serve, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    client = serve(feedback_dir=tmp_path / "file" / "feedback")
    assert_error(send(client), 507, "feedback_not_stored")
    assert client.get("/api/v1/review", headers=OPERATOR).json()["total"] == 0
    assert client.post("/api/v1/predict", files={"file": photo()}).status_code == 200


def test_what_a_crash_left_is_put_right_at_the_next_start(serve: Serve, folder: Path) -> None:
    client = serve()
    orphan, moved, kept = (
        send(client, photo((n, 0, 0)), dish="dosa").json()["id"] for n in (10, 90, 200)
    )
    waiting = folder / ".pending" / "_new" / "dosa"
    (folder / ".records" / f"{orphan}.json").unlink()  # as if killed before the record
    (waiting / ".x.jpg.0011.tmp").write_bytes(b"half")
    decide(client, moved, "accept")  # as if killed between record and move
    shutil.move(folder / "dosa" / f"{moved}.jpg", waiting / f"{moved}.jpg")
    (folder / "dosa" / "mine.jpg").write_bytes(photo())
    serve()
    assert files(folder) == sorted(
        [
            *(f".records/{id}.json" for id in (moved, kept)),
            f".pending/_new/dosa/{kept}.jpg",
            f"dosa/{moved}.jpg",
            "dosa/mine.jpg",
        ]
    )


def test_a_damaged_record_hides_no_other(client: TestClient, folder: Path) -> None:
    one, two = (send(client, photo((n, 0, 0))).json()["id"] for n in (10, 90))
    (folder / ".records" / f"{one}.json").write_text('{"id": ')
    assert [item["id"] for item in listed(client)["corrections"]] == [two]


# Reviewing ------------------------------------------------------------------------------------


def test_the_list_is_for_the_operator(client: TestClient, serve: Serve) -> None:
    id = send(client).json()["id"]
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for response in (
            client.get("/api/v1/review", headers=headers),
            client.get(f"/api/v1/review/{id}/photo", headers=headers),
            client.post(f"/api/v1/review/{id}?decision=accept", headers=headers),
        ):
            assert_error(response, 401, "wrong_token")
    assert listed(client)["total"] == 1
    assert_error(serve(reload_token=None).get("/api/v1/review", headers=OPERATOR), 404, "not_found")


def test_the_operator_sees_each_photo_and_what_was_answered(client: TestClient) -> None:
    asked = client.post("/api/v1/predict", files={"file": photo()})
    id = send(client, dish="dosa", request_id=asked.headers["x-request-id"]).json()["id"]
    (item,) = listed(client)["corrections"]
    assert item["id"] == id
    assert (item["class_name"], item["food_name"], item["is_new"]) == ("dosa", "Dosa", True)
    assert item["answer"]["class_name"] == asked.json()["class_name"]
    shown = client.get(f"/api/v1/review/{id}/photo", headers=OPERATOR)
    assert shown.headers["content-type"] == "image/jpeg"
    assert shown.headers["cache-control"] == "no-store"
    assert Image.open(io.BytesIO(shown.content)).size == (64, 48)


def test_accepted_relabeled_discarded(client: TestClient, folder: Path) -> None:
    one, two, three = (
        send(client, photo((n, 0, 0)), dish="dosa").json()["id"] for n in (10, 90, 200)
    )
    assert decide(client, one, "accept").json()["state"] == "accepted"
    assert decide(client, two, "accept", dish="Idli Sambar").json()["class_name"] == "idli_sambar"
    assert decide(client, three, "discard").status_code == 200
    assert files(folder) == sorted(
        [
            f"dosa/{one}.jpg",
            f"idli_sambar/{two}.jpg",
            *(f".records/{id}.json" for id in (one, two)),
        ]
    )
    assert decide(client, one, "accept", dish="idli").status_code == 200  # a second thought
    assert not (folder / "dosa").exists()
    assert listed(client, "accepted")["total"] == 2
    assert_error(decide(client, one, "accept", dish="../idli"), 422, "invalid_request")
    assert_error(decide(client, three, "accept"), 404, "not_found")


def test_sending_it_again_does_not_undo_a_review(client: TestClient, folder: Path) -> None:
    id = send(client, dish="dosa").json()["id"]
    decide(client, id, "accept", dish="idli")
    again = send(client, dish="samosa")
    assert (again.status_code, again.json()["state"]) == (200, "accepted")
    assert f"idli/{id}.jpg" in files(folder)


def test_a_photo_that_was_removed_by_hand_can_be_sent_again(
    client: TestClient, folder: Path
) -> None:
    id = send(client, dish="dosa").json()["id"]
    decide(client, id, "accept")
    (folder / "dosa" / f"{id}.jpg").unlink()
    again = send(client, dish="idli")
    assert (again.status_code, again.json()["state"]) == (201, "pending")
    assert files(folder) == [f".pending/_new/idli/{id}.jpg", f".records/{id}.json"]


def test_nothing_reaches_training_that_was_not_accepted(client: TestClient, folder: Path) -> None:
    ids = [send(client, photo((n, 0, 0)), dish="dosa").json()["id"] for n in range(0, 250, 42)]
    for place in (folder, folder / ".pending" / ".."):
        with pytest.raises(DataError, match="no class folders"):
            load_custom(place, Audit())
    needed = listed(client)["needed_photos"]
    for id in ids[: needed - 1]:
        decide(client, id, "accept")
    with pytest.raises(DataError, match=f"images: {needed - 1}, needed: {needed}"):
        load_custom(folder, Audit())
    decide(client, ids[needed - 1], "accept")
    audit = Audit()
    found = load_custom(folder, audit)
    assert sorted(Path(path).stem for path in found["dosa"]) == sorted(ids[:needed])
    assert (list(found), audit.skipped, audit.other_files) == (["dosa"], [], {})
    assert listed(client)["accepted_photos"] == {"dosa": needed}


def test_two_servers_may_share_the_folder(serve: Serve) -> None:
    one, two = serve(), serve()
    receipt = send(one).json()
    assert listed(two)["total"] == 1
    assert send(two).status_code == 200
    assert delete(two, receipt).status_code == 204
    assert listed(one)["total"] == 0


def test_a_lock_that_is_held_is_waited_for_and_then_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.feedback import FeedbackStorageError
    from app.ml.durable import file_lock

    monkeypatch.setattr("app.feedback.LOCK_SECONDS", 0.1)
    store = FeedbackStore(folder, Settings())
    store.tidy()
    with file_lock(folder / ".lock"), pytest.raises(FeedbackStorageError, match="another process"):
        store.tidy()


def test_a_new_model_that_knows_the_dish_makes_it_known(serve: Serve, tmp_path: Path) -> None:
    release_model(tmp_path / "models", ["apple_pie", "dosa"])
    client = serve(model_dir=tmp_path / "models")
    assert send(client, dish="Dosa").json()["is_new"] is False
