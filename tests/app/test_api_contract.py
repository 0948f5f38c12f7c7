"""The API does what its own OpenAPI description says, for requests that nobody thought of."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from app.main import create_app
from app.settings import Settings

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-sixteen-or-more"
ANSWERS = {200, 400, 413, 415, 422}


@pytest.fixture(scope="module")
def app(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    values: dict[str, Any] = {"model_dir": model_dir, "reload_token": TOKEN}
    values |= {"feedback_dir": tmp_path_factory.mktemp("feedback"), "feedback_per_minute": 10**6}
    app = create_app(Settings(workers=2, **values))
    with TestClient(app):  # loads the model
        yield app


schema = schemathesis.openapi.from_dict(create_app(Settings(model_dir=Path("none"))).openapi())


@schema.parametrize()
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_description_holds(case: schemathesis.Case, app: FastAPI) -> None:
    """Status, headers and body of every answer are described, and none is a 5xx."""
    case.operation.schema.app = case.operation.app = app
    # No schema can say "these bytes are a picture", so bytes that it allows may be refused.
    case.call_and_validate(excluded_checks=[positive_data_acceptance])


# Multipart ------------------------------------------------------------------------------------


def _photo() -> bytes:
    Image.radial_gradient("L").resize((48, 32)).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


PHOTO = _photo()
HEADER = b'Content-Disposition: form-data; name="file"; filename="a.jpg"'
HEADERS = st.sampled_from(
    [
        HEADER,
        HEADER.replace(b"a.jpg", b"../../a\0.jpg"),
        HEADER.replace(b"a.jpg", b"x" * 5000),
        HEADER.replace(b'filename="a.jpg"', b"filename*=UTF-8''%ff%fe"),
        HEADER.replace(b'; filename="a.jpg"', b""),
        HEADER.replace(b'name="file"', b'name="other"'),
        HEADER.replace(b'"', b""),
        HEADER + b"\r\nContent-Type: text/html; charset=utf-16",
        HEADER + b"\r\nContent-Transfer-Encoding: base64",
        HEADER + b"\r\n" + HEADER,
        b"Content-Disposition: attachment",
        b"no header at all",
        b"",
    ]
)
PARTS = st.tuples(HEADERS, st.sampled_from([PHOTO, PHOTO[:300], b"", b"\r\n--edge", b"\0" * 3000]))
TYPES = st.sampled_from(
    [
        "multipart/form-data; boundary=edge",
        'multipart/form-data; boundary="edge"',
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=other",
        "multipart/form-data; charset=nonsense; boundary=edge",
        "multipart/mixed; boundary=edge",
        "application/x-www-form-urlencoded",
        "image/jpeg",
        "",
    ]
)


# Of a body that ends inside a part, Starlette leaves the part's file to be closed by Python.
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=300, deadline=None)
@given(
    parts=st.lists(PARTS, max_size=4),
    content_type=TYPES,
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
    kept=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_no_multipart_body_is_our_error(
    app: FastAPI,
    parts: list[tuple[bytes, bytes]],
    content_type: str,
    changes: list[tuple[float, int]],
    kept: float,
) -> None:
    pieces = (b"--edge\r\n%b\r\n\r\n%b\r\n" % part for part in parts)
    body = bytearray(b"".join(pieces) + b"--edge--\r\n")
    for place, value in changes:
        body[int(place * len(body))] = value
    client = TestClient(app, raise_server_exceptions=False)
    response = client.post(
        "/api/v1/predict",
        content=bytes(body[: int(kept * len(body))]),
        headers={"Content-Type": content_type},
    )
    assert response.status_code in ANSWERS, response.text
    if response.status_code != 200:
        assert set(response.json()) == {"code", "detail", "request_id"}


def test_a_well_formed_body_is_answered(app: FastAPI) -> None:
    """The fuzz above starts from bodies that do work."""
    body = b"--edge\r\n%b\r\n\r\n%b\r\n--edge--\r\n" % (HEADER, PHOTO)
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    assert TestClient(app).post("/api/v1/predict", content=body, headers=headers).is_success


@pytest.mark.parametrize("size", [1000, 100_000])
def test_many_parts_are_refused(size: int, app: FastAPI) -> None:
    part = b'--edge\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    response = TestClient(app).post("/api/v1/predict", content=part * size, headers=headers)
    assert response.status_code in (400, 422)


def test_noise_is_not_a_picture(app: FastAPI) -> None:
    response = TestClient(app).post("/api/v1/predict", files={"file": os.urandom(4096)})
    assert response.status_code in (400, 415)
