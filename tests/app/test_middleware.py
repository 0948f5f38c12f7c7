"""What holds for every request: methods, paths, origins, headers, errors, labels, the log."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.logs import JsonFormatter, OncePerSecond
from app.main import create_app
from app.middleware import RunningRequests
from app.settings import Settings

ORIGINS = ["https://app.example", "capacitor://localhost", "null"]
GET_PATHS = [
    *("/", "/health", "/ready", "/metrics", "/api/v1/model", "/api/v1/foods/samosa"),
    *("/docs", "/openapi.json", "/static/app.js", "/static/icon.svg"),
]


def serve(model_dir: Path, **settings: Any) -> TestClient:
    app = create_app(Settings(model_dir=model_dir, workers=1, **settings))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(model_dir: Path) -> Iterator[TestClient]:
    with serve(model_dir, cors_origins=ORIGINS) as client:
        yield client


def assert_error(response: Any, status: int, code: str) -> str:
    assert response.status_code == status, response.text
    error: dict[str, str] = response.json()
    assert set(error) == {"code", "detail", "request_id"}
    assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    return error["detail"]


def metric(client: TestClient, line: str) -> float:
    match = re.search(rf"^{re.escape(line)} (\S+)$", client.get("/metrics").text, re.M)
    return float(match[1]) if match else 0.0


# Methods and paths ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", GET_PATHS)
def test_every_get_answers_head(path: str, client: TestClient) -> None:
    got, head = client.get(path), client.head(path)
    assert (got.status_code, head.status_code) == (200, 200)
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":  # which has counted the request in between
        assert head.headers["content-length"] == got.headers["content-length"]


def test_every_route_of_the_description_is_among_them(client: TestClient) -> None:
    described = client.get("/openapi.json").json()["paths"]
    gets = {path for path, operations in described.items() if "get" in operations}
    off = {"/api/v1/review", "/api/v1/review/{id}/photo"}  # without a folder for feedback
    assert gets - off - {"/api/v1/foods/{class_name}"} <= set(GET_PATHS)
    assert not any("head" in operations for operations in described.values())


def test_head_is_counted_as_head_and_refused_where_there_is_no_get(client: TestClient) -> None:
    line = 'nutrilearn_requests_total{method="HEAD",route="/health",status="200"}'
    before = metric(client, line)
    client.head("/health")
    assert metric(client, line) == before + 1
    assert client.head("/api/v1/predict").status_code == 405
    assert client.head("/nothing").status_code == 404


@pytest.mark.parametrize("path", [path for path in GET_PATHS if path != "/"])
@pytest.mark.parametrize("slashes", ["/", "//"])
def test_a_slash_at_the_end_makes_no_difference(
    path: str, slashes: str, client: TestClient
) -> None:
    response = client.get(path + slashes, follow_redirects=False)
    assert response.status_code == 200
    assert response.headers["content-type"] == client.get(path).headers["content-type"]


def test_a_photo_may_be_sent_to_either_address(client: TestClient) -> None:
    files = {"file": b"no photo"}
    for path in ("/api/v1/predict", "/api/v1/predict/"):
        response = client.post(path, files=files, follow_redirects=False)
        assert_error(response, 415, "unsupported_image")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in GET_PATHS if path != "/openapi.json"),
        *((m, "/api/v1/predict") for m in ("GET", "PUT", "DELETE", "OPTIONS", "BREW", "TRACE")),
    ],
)
def test_a_wrong_method_is_an_error_like_any_other(
    method: str, path: str, client: TestClient
) -> None:
    assert_error(client.request(method, path), 405, "method_not_allowed")


def test_a_wrong_method_is_told_the_right_ones(client: TestClient) -> None:
    assert client.post("/health").headers["allow"] == "GET, HEAD"
    assert client.get("/api/v1/predict").headers["allow"] == "POST"


@pytest.mark.parametrize("given", ["bytes=9999999-", "bytes=5-1", "apples=0-1", "bytes"])
@pytest.mark.parametrize("path", ["/", "/static/style.css"])
def test_a_bad_range_is_an_error_like_any_other(given: str, path: str, client: TestClient) -> None:
    before = metric(client, 'nutrilearn_refusals_total{code="internal_error"}')
    response = client.get(path, headers={"Range": given, "Origin": ORIGINS[0]})
    beyond = given == "bytes=9999999-"
    code = "range_not_satisfiable" if beyond else "malformed_request"
    assert_error(response, 416 if beyond else 400, code)
    assert response.headers.get("content-range", "").startswith("bytes */") == beyond
    assert response.headers["access-control-allow-origin"] == ORIGINS[0]
    assert metric(client, 'nutrilearn_refusals_total{code="internal_error"}') == before


def test_a_good_range_is_answered(client: TestClient) -> None:
    response = client.get("/static/style.css", headers={"Range": "bytes=0-9"})
    assert response.status_code == 206 and len(response.content) == 10


@pytest.mark.parametrize("root_path", ["", "/nutri"])
def test_below_a_path_everything_finds_everything(root_path: str, model_dir: Path) -> None:
    app = create_app(Settings(model_dir=model_dir, workers=1))
    with TestClient(app, root_path=root_path, base_url=f"http://server{root_path}") as client:
        assert client.get("/health/").is_success
        page = client.get("/")
        assert page.is_success and 'src="static/app.js"' in page.text  # relative, as all its links
        (described,) = re.findall(r"url: '(\S+openapi.json)'", client.get("/docs/").text)
        assert described == f"{root_path}/openapi.json"
        servers = client.get("/openapi.json").json().get("servers", [])
        assert [server["url"] for server in servers] == ([root_path] if root_path else [])


# Origins --------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(
    "headers",
    [
        *("content-type", "x-request-id", "authorization", "cache-control,x-requested-with"),
        *("sentry-trace,baggage", "ngrok-skip-browser-warning", "x-anything-at-all"),
    ],
)
def test_a_named_origin_may_send_any_header(origin: str, headers: str, client: TestClient) -> None:
    response = client.options(
        "/api/v1/predict",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": headers,
            "Access-Control-Request-Private-Network": "true",
        },
    )
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert response.headers["access-control-allow-headers"] == headers
    assert "POST" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("origin", ["https://evil.example", "http://app.example", "x" * 5000])
def test_the_preflight_of_another_origin_is_an_error_like_any_other(
    origin: str, client: TestClient
) -> None:
    line = 'nutrilearn_refusals_total{code="origin_refused"}'
    before = metric(client, line)
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    response = client.options("/api/v1/predict", headers=headers)
    detail = assert_error(response, 400, "origin_refused")
    assert origin[:50] in detail and len(detail) < 300
    assert "access-control-allow-origin" not in response.headers
    assert metric(client, line) == before + 1


def test_errors_carry_the_headers_that_let_a_page_read_them(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the secret of the house")

    def ask(data: bytes) -> Any:
        return client.post("/api/v1/predict", files={"file": data}, headers={"Origin": ORIGINS[1]})

    responses = [ask(b"no photo"), ask(bytes(21 * 2**20))]
    monkeypatch.setattr("app.ml.predictor.FoodPredictor.preprocess", fail)
    responses.append(ask(b"x"))
    assert [response.status_code for response in responses] == [415, 413, 500]
    for response in responses:
        assert response.headers["access-control-allow-origin"] == ORIGINS[1]
        assert "X-Request-ID" in response.headers["access-control-expose-headers"]
        assert_error(response, response.status_code, response.json()["code"])


# Labels and the log ---------------------------------------------------------------------------


def test_what_clients_choose_is_no_label(model_dir: Path) -> None:
    def labels(numbers: range) -> set[str]:
        for i in numbers:
            origin = {"Origin": f"a://{i}", "Access-Control-Request-Method": "X"}
            client.request(f"METHOD{i}", f"/path{i}")
            client.request("M" * 60_000, "/health")
            client.get(f"/static/{i}")
            client.get(f"/api/v1/foods/{i}", headers={"X-Request-ID": str(i)})
            client.post(f"/api/v1/predict?{i}", content=b"x", headers={"Content-Type": f"a/{i}"})
            client.options("/", headers=origin)
        return set(re.findall(r"^nutrilearn_\S+\{.*\}", client.get("/metrics").text, re.M))

    with serve(model_dir, cors_origins=ORIGINS) as client:
        assert labels(range(2)) | labels(range(2, 4)) == labels(range(2, 50))
        assert 'method="other"' in client.get("/metrics").text


@pytest.mark.parametrize("long", ["a" * 60_000, "é\u202e\x1b[31m\n" * 100])
def test_a_log_line_is_bounded_and_escaped(
    long: str, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    scope = {
        **{"type": "http", "method": long, "path": f"/{long}", "query_string": b""},
        **{"headers": [], "client": (long, 1)},
    }

    async def send(_: object) -> None:
        pass

    caplog.clear()
    with caplog.at_level(logging.INFO, "app.middleware"):
        asyncio.run(client.app(scope, None, send))  # type: ignore[arg-type]
    (record,) = [record for record in caplog.records if record.name == "app.middleware"]
    line = JsonFormatter().format(record)
    assert len(line) < 3000 and line.isascii() and line.isprintable()
    assert json.loads(line)["method"].startswith(long[:10])


def test_a_traceback_is_one_bounded_line() -> None:
    try:
        raise ValueError("x" * 10_000 + "\n the end")
    except ValueError as error:
        record = logging.makeLogRecord({"msg": "y" * 10_000, "exc_info": (ValueError, error, None)})
    line = JsonFormatter().format(record)
    assert len(line) < 6000 and "\n" not in line
    assert json.loads(line)["traceback"].endswith("the end")


def test_a_message_that_is_repeated_is_logged_once_a_second() -> None:
    """As asyncio does where no file descriptor is free."""
    out_of_files, once_per_second = ("no free file", 1000.0), OncePerSecond()
    records = [out_of_files, out_of_files, ("another", 1000.1), ("another", 1000.9)]
    records += [("another", 1001.2), ("another", 900.0)]  # a clock may run back
    passed = [
        once_per_second.filter(logging.makeLogRecord({"msg": message, "created": when}))
        for message, when in records
    ]
    assert passed == [True, False, True, False, True, True]


# Models and the token -------------------------------------------------------------------------


def test_no_answer_shows_a_folder_of_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "my models"
    token = "a-token-of-sixteen-or-more"
    headers = {"Authorization": f"Bearer {token}"}
    with serve(folder, reload_token=token) as client:
        answers = [client.get("/ready"), client.get("/api/v1/model")]
        answers.append(client.post("/api/v1/model/reload", headers=headers))
        folder.mkdir()
        (folder / "model_config.json").write_text("{")
        answers.append(client.post("/api/v1/model/reload", headers=headers))
        answers.append(client.get("/ready"))
    for answer in answers:
        detail = answer.json()["detail"]
        assert str(tmp_path) not in detail and not re.search(r"(^|[\s'\"(])/\w+/", detail), detail
    assert "in my models; train one: python backend/train_model.py" in answers[0].json()["detail"]


def test_the_token_is_checked_before_the_version(model_dir: Path) -> None:
    token = "a-tökén-of-sixteen-or-more"
    with serve(model_dir, reload_token=token) as client:

        def reload(given: str, version: str) -> Any:
            headers = {"Authorization": f"Bearer {given}".encode()}
            url = f"/api/v1/model/reload?version={version}"
            return client.post(url, headers=headers)  # type: ignore[arg-type]

        for version in ("newest", "0", "1_0", "1"):
            assert_error(reload("wrong", version), 401, "wrong_token")
        for version in ("newest", "0", "1_0", "0_1"):
            assert_error(reload(token, version), 422, "invalid_request")
        assert reload(token, "1").status_code == 200
    with serve(model_dir) as client:
        assert_error(reload("wrong", "newest"), 404, "not_found")


# The end --------------------------------------------------------------------------------------


def test_a_request_that_is_cancelled_is_told_that_the_server_stops(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a body is still awaited."""
    monkeypatch.setattr("app.middleware.STOPPING_SECONDS", 0)
    sent: list[Any] = []
    scope = {
        **{"type": "http", "method": "POST", "path": "/api/v1/predict", "query_string": b""},
        "headers": [(b"content-type", b"image/jpeg"), (b"content-length", b"1000")],
    }

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    async def cancel() -> None:
        app = create_app(Settings(model_dir=model_dir, workers=1))
        request = asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.2)
        running: RunningRequests = app.state.running
        running.stop()
        await asyncio.wait_for(request, 20)

    asyncio.run(cancel())
    assert sent[0]["status"] == 503
    assert json.loads(sent[1]["body"])["code"] == "stopping"
