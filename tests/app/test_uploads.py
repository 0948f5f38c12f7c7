"""Photos as clients really send them, and how much of them is held."""

import asyncio
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.inference import OverloadedError
from app.main import create_app
from app.metrics import Metrics
from app.settings import Settings
from app.uploads import BLOCK, Body, MalformedFormError, NoPhotoError, UploadMemory, take_photo

PATH = "/api/v1/predict"
FORM = "multipart/form-data; boundary=edge"


def encoded(image: Image.Image, form: str) -> bytes:
    image.save(buffer := io.BytesIO(), form)
    return buffer.getvalue()


PHOTO = encoded(Image.radial_gradient("L").resize((64, 48)), "JPEG")
LARGE_PHOTO = encoded(Image.effect_noise((1500, 1000), 90), "PNG")  # more than 1 MiB


@pytest.fixture(scope="module")
def client(model_dir: Path) -> Iterator[TestClient]:
    app = create_app(Settings(model_dir=model_dir, workers=2))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def part(*headers: str, data: bytes = PHOTO) -> bytes:
    return b"--edge\r\n" + "\r\n".join([*headers, "", ""]).encode() + data + b"\r\n"


def named(rest: str = "", name: str = "file") -> str:
    return f'Content-Disposition: form-data; name="{name}"{rest}'


END = b"--edge--\r\n"


def in_blocks(body: bytes, size: int = 65536) -> Body:
    return [bytearray(body[start : start + size]) for start in range(0, len(body), size)]


def post(client: TestClient, body: bytes, content_type: str | None = FORM) -> Any:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return client.post(PATH, content=body, headers=headers)


@pytest.mark.parametrize(
    "body",
    [
        part(named()) + END,
        part(named(), "Content-Type: image/jpeg") + END,
        part(named('; filename=""')) + END,
        part(named("; filename*=UTF-8''caf%C3%A9.jpg")) + END,
        part(named('; filename="a.jpg"'), "Content-Type: application/octet-stream") + END,
        part("content-disposition:form-data;name=file") + END,
        part(named(), data=LARGE_PHOTO) + END,
        part(named(), data=PHOTO + b"\r\n--edg\r\n--edgy") + END,
        b"\r\n" + part(named()) + END + b"an epilogue",
        part(named(name="comment"), data=b"lunch") + part(named()) + END,
        part(named()) + part(named(name="comment"), data=b"lunch") + END,
        part(named(), data=b"no photo") + part(named()) + END,  # the last of a name counts
        part(named()) + b"--edge\r\n",  # cut off, but after the photo
    ],
    ids=range(13),
)
def test_a_form_is_read_however_it_is_written(body: bytes, client: TestClient) -> None:
    response = post(client, body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "content_type",
    ["image/jpeg", "image/png", "image/*", "IMAGE/JPEG; q=1", "application/octet-stream"],
)
@pytest.mark.parametrize("photo", [PHOTO, LARGE_PHOTO], ids=["small", "large"])
def test_the_whole_body_may_be_the_photo(
    photo: bytes, content_type: str, client: TestClient
) -> None:
    assert post(client, photo, content_type).status_code == 200


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code", "words"),
    [
        (part(named(name="image")) + END, FORM, 422, "invalid_request", "has 'image'"),
        (part(named(name="")) + END, FORM, 422, "invalid_request", "named 'file'"),
        (END, FORM, 422, "invalid_request", "has no field"),
        (part(named())[:200], FORM, 400, "malformed_request", "ends before its last boundary"),
        (part(named())[:30], FORM, 400, "malformed_request", "ends before its last boundary"),
        (b"", FORM, 400, "malformed_request", "ends before its last boundary"),
        (part(named()) + END, "multipart/form-data", 400, "malformed_request", "no boundary"),
        (b"--other\r\n", FORM, 400, "malformed_request", "not valid multipart"),
        (part(*["X: y"] * 20) + END, FORM, 400, "malformed_request", "not valid multipart"),
        (part(named(name="x")) * 1001, FORM, 400, "malformed_request", "more than 1000 fields"),
        (part(named()) + END, "multipart/mixed; boundary=edge", 422, "invalid_request", "mixed"),
        (PHOTO, "application/x-www-form-urlencoded", 422, "invalid_request", "urlencoded"),
        (b'{"file": 1}', "application/json", 422, "invalid_request", "application/json"),
        (PHOTO, None, 422, "invalid_request", "Content-Type: image/jpeg"),
        (PHOTO, "x" * 3000, 422, "invalid_request", "field 'file'"),
        (b"", "image/jpeg", 400, "unreadable_image", "empty"),
        (b"text", "image/jpeg", 415, "unsupported_image", "supported format"),
    ],
    ids=range(17),
)
def test_what_is_wrong_with_an_upload_is_said(
    body: bytes, content_type: str | None, status: int, code: str, words: str, client: TestClient
) -> None:
    response = post(client, body, content_type)
    assert (response.status_code, response.json()["code"]) == (status, code)
    detail = response.json()["detail"]
    assert words in detail and len(detail) < 400


@settings(max_examples=200, deadline=None)
@given(
    photo=st.binary(min_size=0, max_size=200),
    before=st.lists(st.binary(max_size=20), max_size=3),
    noise=st.sampled_from([b"", b"\r\n", b"\r\n--", b"\r\n--edg", b"--edge", b"\r\r\n", b"-"]),
    times=st.integers(0, 5000),
    block=st.integers(1, 70_000),
)
def test_a_form_gives_back_what_was_put_in(
    photo: bytes, before: list[bytes], noise: bytes, times: int, block: int
) -> None:
    """However it is cut into blocks."""
    photo = noise * times + photo
    if b"\r\n--edge" in b"\r\n" + photo + b"\r\n":
        return
    others = [part(named(name="x"), data=data) for data in before if b"--edge" not in data]
    body = in_blocks(b"".join([*others, part(named(), data=photo), END]), block)
    assert take_photo(body, FORM) == photo
    assert body == []


@pytest.mark.parametrize(
    "filling", [b"\r\n--edgeX", b"\r\n--edge" + b" " * 11 * 2**20, b"\r\n--edge\r\n\r\n"]
)
def test_a_form_that_is_made_to_be_slow_is_given_up(filling: bytes) -> None:
    body = in_blocks(part(named())[:-2] + filling * (12 * 2**20 // len(filling)))
    began = time.thread_time()
    with pytest.raises(MalformedFormError, match=r"takes too long|more than 1000 fields"):
        take_photo(body, FORM)
    assert time.thread_time() - began < 3


def test_a_form_of_20_mib_is_cheap() -> None:
    photo = LARGE_PHOTO * (20 * 2**20 // len(LARGE_PHOTO))
    began = time.thread_time()
    assert take_photo(in_blocks(part(named(), data=photo) + END), FORM) == photo
    assert time.thread_time() - began < 0.5


def test_no_photo_is_no_photo_for_every_kind_of_name() -> None:
    for name in ("File", "file ", "files", "file[]", "'"):
        with pytest.raises(NoPhotoError):
            take_photo(in_blocks(part(named(name=name)) + END), FORM)


# Memory ---------------------------------------------------------------------------------------


def request_of(*pieces: bytes) -> Request:
    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False

    async def receive() -> Any:
        return messages.pop(0)

    return Request({"type": "http", "method": "POST", "headers": []}, receive)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_a_body_is_kept_whole_in_few_blocks(sizes: list[int]) -> None:
    """Pieces as they come from the network, small and large."""
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]

    async def kept() -> tuple[bytes, int]:
        async with UploadMemory(10**9, Metrics()).body_of(request_of(*pieces)) as body:
            return b"".join(body), len(body)

    whole, blocks = asyncio.run(kept())
    assert whole == b"".join(pieces)
    assert blocks <= 2 + 2 * (len(whole) // BLOCK)


def test_all_bodies_together_are_bounded() -> None:
    memory = UploadMemory(100, Metrics())

    async def attack() -> None:
        async with memory.body_of(request_of(b"x" * 40, b"x" * 30)) as first:
            assert (memory.held, first) == (70, [b"x" * 70])
            with pytest.raises(OverloadedError):
                async with memory.body_of(request_of(b"x" * 20, b"x" * 20)):
                    raise AssertionError("110 bytes were held")
            assert memory.held == 70
            async with memory.body_of(request_of(b"x" * 30)):
                assert memory.held == 100
        assert memory.held == 0 and first == []

    asyncio.run(attack())


def test_a_body_that_breaks_off_gives_its_bytes_back() -> None:
    memory = UploadMemory(100, Metrics())

    async def receive() -> Any:
        memory.seen = memory.held  # type: ignore[attr-defined]
        body = {"type": "http.request", "body": b"x" * 40, "more_body": True}
        return {"type": "http.disconnect"} if memory.held else body

    async def leave() -> None:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        with pytest.raises(Exception):  # noqa: B017
            async with memory.body_of(request):
                raise AssertionError("it was never whole")

    asyncio.run(leave())
    assert memory.held == 0 and memory.seen == 40  # type: ignore[attr-defined]


def test_uploads_beyond_the_memory_are_told_to_come_back(model_dir: Path) -> None:
    values = {"upload_memory_bytes": 1, "max_upload_bytes": len(PHOTO) + 500}
    with TestClient(create_app(Settings(model_dir=model_dir, workers=1, **values))) as client:
        assert post(client, PHOTO, "image/jpeg").status_code == 200  # one always has room
        client.app.state.uploads.held = len(PHOTO)  # type: ignore[attr-defined]
        response = post(client, PHOTO, "image/jpeg")
        assert response.status_code == 429 and response.json()["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
        assert f"nutrilearn_upload_bytes {len(PHOTO)}" in client.get("/metrics").text.replace(
            ".0\n", "\n"
        )
