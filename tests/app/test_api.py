"""The API's contract: its fields, its errors, its limits, its log, and new models while it runs."""

import asyncio
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from tests.support import standin
from tests.support.released import release_forms, release_model

from app.errors import ERRORS, OF_NO_ROUTE
from app.inference import TOP_K
from app.logs import JsonFormatter
from app.main import create_app
from app.ml.artifacts import (
    Decision,
    read_record,
    read_state,
    weights_name,
)
from app.ml.model import build_model, head_linear
from app.ml.predictor import load_model_for_inference
from app.ml.preprocessing import EvalTransform, load_image, normalize
from app.settings import Settings

TOKEN = "a-token-of-sixteen-or-more"


def plate(size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A picture that looks different from every side."""
    image = Image.radial_gradient("L").resize(size).convert("RGB")
    image.paste((200, 40, 40), (0, 0, size[0] // 2, size[1] // 3))
    image.paste((40, 160, 60), (0, size[1] // 2, size[0] // 5, size[1]))
    return image


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    image.save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def ask(client: TestClient, data: bytes, name: str = "photo.jpg", **headers: str) -> Any:
    return client.post("/api/v1/predict", files={"file": (name, data)}, headers=headers)


def serve(model_dir: Path, **settings: Any) -> TestClient:
    app = create_app(Settings(model_dir=model_dir, **{"workers": 2, **settings}))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(model_dir: Path) -> Iterator[TestClient]:
    with serve(model_dir, cors_origins=["https://app.example"]) as client:
        yield client


@pytest.fixture(scope="module")
def sharp_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that tells pictures apart, as its batch-norm has seen a batch."""
    folder = tmp_path_factory.mktemp("sharp")
    record = release_model(folder, ["apple_pie", "chole", "jalebi", "samosa"])
    model = build_model(record.model_name, len(record.classes))
    torch.nn.init.normal_(head_linear(model, record.model_name).weight, std=0.05)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    release_model(folder, record.classes, model=model)
    return folder


@pytest.fixture
def two_versions(tmp_path: Path) -> Path:
    release_model(tmp_path, ["apple_pie", "samosa", "jalebi"])
    release_model(tmp_path, ["apple_pie", "samosa", "jalebi", "waffles"], seed=1)
    return tmp_path


# The answer -----------------------------------------------------------------------------------


def test_the_answer_has_the_established_fields(client: TestClient) -> None:
    response = ask(client, encode(plate(), "JPEG"))
    assert response.status_code == 200
    answer = response.json()
    assert isinstance(answer["food_name"], str)
    assert 0 <= answer["confidence"] <= 1
    assert isinstance(answer["category"], str)
    assert isinstance(answer["cuisine"], str)
    written = datetime.fromisoformat(answer["timestamp"].replace("Z", "+00:00"))
    assert written.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - written) < timedelta(minutes=1)
    assert set(answer) == {
        *("food_name", "confidence", "nutrition", "category", "cuisine", "timestamp"),
        *("class_name", "top_predictions", "serving_g", "nutrition_per_100g"),
        *("nutrition_source", "nutrition_match", "verdict", "model_version"),
    }
    assert response.headers["x-model-version"] == str(answer["model_version"]) == "1"


def test_where_the_model_looked_is_told_on_demand_only(sharp_dir: Path) -> None:
    with serve(sharp_dir) as client:
        plain = ask(client, encode(plate())).json()
        asked = client.post(
            "/api/v1/predict?explain=true", files={"file": ("p.png", encode(plate()))}
        ).json()
        refused = client.post("/api/v1/predict?explain=maybe", files={"file": ("p.png", b"")})
    assert refused.status_code == 422
    found = asked.pop("activation")
    assert plain | {"timestamp": ""} == asked | {"timestamp": ""}  # the map is all that is new
    assert found["class_name"] == asked["class_name"] and found["reason"] is None
    assert 0 < found["side"] <= 1
    values = [value for row in found["grid"] for value in row]
    assert max(values) == 1 and min(values) >= 0 and len(values) > 16


def test_nutrition_is_the_tables_per_serving_and_per_100_g(tmp_path: Path) -> None:
    release_model(tmp_path, ["apple_pie", "baklava", "waffles"])
    with serve(tmp_path) as client:
        answer = ask(client, encode(plate())).json()
    nutrients = {"calories", "protein", "carbs", "fat", "fiber"}
    assert set(answer["nutrition"]) == set(answer["nutrition_per_100g"]) == nutrients
    for name in nutrients:
        per_serving = answer["nutrition_per_100g"][name] * answer["serving_g"] / 100
        assert answer["nutrition"][name] == pytest.approx(per_serving, abs=0.051)
    assert answer["nutrition_source"].startswith("USDA FNDDS")


@pytest.mark.parametrize("names", [["chole", "dal_fry", "poori_bhaji"], ["chole", "dal_fry"]])
def test_a_class_without_a_source_has_no_nutrition(names: list[str], tmp_path: Path) -> None:
    release_model(tmp_path, names)
    with serve(tmp_path) as client:
        answer = ask(client, encode(plate())).json()
    nothing = ("nutrition", "nutrition_per_100g", "serving_g", "nutrition_source", "category")
    assert [answer[field] for field in nothing] == [None] * 5
    assert answer["food_name"] in ("Chole", "Dal Fry", "Poori Bhaji")
    assert len(answer["top_predictions"]) == len(names)


def test_top_predictions_fall_and_start_with_the_answer(sharp_dir: Path) -> None:
    with serve(sharp_dir) as client:
        answer = ask(client, encode(plate())).json()
    top = answer["top_predictions"]
    assert len(top) == TOP_K
    assert top == sorted(top, key=lambda guess: -guess["confidence"])
    assert all(answer[key] == top[0][key] for key in ("class_name", "food_name", "confidence"))


@pytest.mark.parametrize(
    ("confident_at", "food_at", "verdict"),
    [(0.0, -100.0, "confident"), (1.1, -100.0, "unsure"), (0.0, 100.0, "not_food")],
)
def test_verdicts(confident_at: float, food_at: float, verdict: str, tmp_path: Path) -> None:
    decision = Decision(1.0, confident_at, food_at)
    release_model(tmp_path, ["apple_pie", "samosa", "waffles"], decision=decision)
    with serve(tmp_path) as client:
        answer = ask(client, encode(plate())).json()
    assert answer["verdict"] == verdict
    assert (answer["nutrition"] is None) == (verdict == "not_food")
    assert (answer["nutrition_per_100g"] is None) == (verdict == "not_food")
    assert isinstance(answer["food_name"], str)  # established clients read it always


def _turned(orientation: int) -> bytes:
    """The plate stored as a camera would that was held in this way, lossless."""
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> PIL transpose
    image = plate()
    if orientation > 1:
        image = image.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, "PNG", exif=exif)


def _grey16() -> bytes:
    grey = plate().convert("L").convert("I").point(lambda value: value * 257)
    return encode(grey.convert("I;16"))


FORMS: dict[str, Callable[[], bytes]] = {
    **{f"exif {i}": lambda i=i: _turned(i) for i in range(1, 9)},  # type: ignore[misc]
    "jpeg": lambda: encode(plate(), "JPEG"),
    "large jpeg": lambda: encode(plate((2400, 1800)), "JPEG"),
    "grey": lambda: encode(plate().convert("L"), "JPEG"),
    "cmyk": lambda: encode(plate().convert("CMYK"), "JPEG"),
    "palette": lambda: encode(plate().convert("P"), "PNG", transparency=0),
    "alpha": lambda: encode(Image.merge("RGBA", (*plate().split(), plate().convert("L")))),
    "16 bit": _grey16,
    "webp": lambda: encode(plate(), "WEBP"),
    "avif": lambda: encode(plate(), "AVIF"),
}


@pytest.fixture(scope="module")
def served(sharp_dir: Path) -> Iterator[Callable[[bytes], torch.Tensor]]:
    """File -> probabilities of the four classes, in class order, as the server answers."""
    classes = read_record(sharp_dir).classes

    def probabilities(data: bytes) -> torch.Tensor:
        top = ask(client, data).json()["top_predictions"]
        known = {guess["class_name"]: guess["confidence"] for guess in top}
        rest = 1 - sum(known.values())  # the fourth is not among the top three
        return torch.tensor([known.get(name, rest) for name in classes])

    with serve(sharp_dir) as client:
        yield probabilities


@pytest.mark.parametrize("form", FORMS)
def test_training_predictor_and_server_agree(
    form: str, sharp_dir: Path, served: Callable[[bytes], torch.Tensor]
) -> None:
    data, record = FORMS[form](), read_record(sharp_dir)
    model = build_model(record.model_name, len(record.classes))
    model.load_state_dict(read_state(sharp_dir, record))
    pixels = EvalTransform(record.preprocessing)(load_image(data)).unsqueeze(0)
    with torch.no_grad():
        validated = model.eval()(normalize(pixels, record.preprocessing))[0]
    predictor = load_model_for_inference(sharp_dir)
    predicted = predictor.logits(predictor.preprocess(data).unsqueeze(0))[0]
    torch.testing.assert_close(predicted, validated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(served(data), validated.softmax(0), rtol=0, atol=1e-5)


def test_every_orientation_is_the_upright_photo(served: Callable[[bytes], torch.Tensor]) -> None:
    upright = served(encode(plate()))
    for orientation in range(1, 9):
        torch.testing.assert_close(served(_turned(orientation)), upright, rtol=0, atol=1e-5)
    lying = served(encode(plate().transpose(Image.Transpose.ROTATE_90)))
    assert (lying - upright).abs().max() > 0.01  # the model does see the difference


# Errors ---------------------------------------------------------------------------------------

MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}
REFUSED: dict[str, tuple[int, str, Callable[[TestClient], Any]]] = {
    "no file": (422, "invalid_request", lambda c: c.post("/api/v1/predict")),
    "text": (422, "invalid_request", lambda c: c.post("/api/v1/predict", data={"file": "x"})),
    "json": (422, "invalid_request", lambda c: c.post("/api/v1/predict", json={"file": "x"})),
    "wrong boundary": (
        *(400, "malformed_request"),
        lambda c: c.post("/api/v1/predict", content=b"--y\r\nContent-Dis", headers=MULTIPART),
    ),
    "empty": (400, "unreadable_image", lambda c: ask(c, b"")),
    "half": (400, "unreadable_image", lambda c: ask(c, encode(plate(), "JPEG")[:2000])),
    "html": (415, "unsupported_image", lambda c: ask(c, b"<html>no</html>")),
    "bomb": (413, "too_large", lambda c: ask(c, encode(Image.new("1", (9000, 9000))))),
    "21 MB": (413, "too_large", lambda c: ask(c, bytes(21 * 2**20))),
    "unknown path": (404, "not_found", lambda c: c.get("/api/v1/nothing")),
    "unknown food": (404, "not_found", lambda c: c.get("/api/v1/foods/shoe")),
    "unknown file": (404, "not_found", lambda c: c.get("/static/../main.py")),
    "wrong method": (405, "method_not_allowed", lambda c: c.get("/api/v1/predict")),
    "reload off": (404, "not_found", lambda c: c.post("/api/v1/model/reload")),
}


def assert_error(response: Any, status: int, code: str) -> dict[str, str]:
    assert response.status_code == status, response.text
    error: dict[str, str] = response.json()
    assert set(error) == {"code", "detail", "request_id"}
    assert error["code"] == code
    assert error["detail"] and "\n" not in error["detail"]
    assert error["request_id"] == response.headers["x-request-id"]
    return error


@pytest.mark.parametrize("case", REFUSED)
def test_every_error_has_the_one_shape(case: str, client: TestClient) -> None:
    status, code, send = REFUSED[case]
    assert_error(send(client), status, code)


def test_an_unexpected_error_has_the_shape_too(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr("app.ml.predictor.FoodPredictor.preprocess", fail)
    with serve(model_dir) as client:
        error = assert_error(ask(client, b"x"), 500, "internal_error")
        assert "secret" not in error["detail"]
        assert 'refusals_total{code="internal_error"} 1.0' in client.get("/metrics").text


def test_nothing_but_the_photo_takes_a_thread(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(function: object, *_: object, **__: object) -> None:
        raise AssertionError(f"{function} was given a thread")

    monkeypatch.setattr("anyio.to_thread.run_sync", refuse)  # what FastAPI gives plain functions
    assert ask(client, encode(plate())).status_code == 200


def test_every_status_is_described_with_an_example(client: TestClient) -> None:
    routes = client.get("/openapi.json").json()["paths"]
    documented = {int(status) for status in routes["/api/v1/predict"]["post"]["responses"]}
    assert documented == {200, 400, 408, 413, 415, 422, 429, 500, 503}
    shown = set()
    for operations in routes.values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    content = response["content"]["application/json"]
                    assert content["schema"]["$ref"].endswith("/ErrorBody")
                    assert content["examples"]
                    shown |= set(content["examples"])
    assert shown == set(ERRORS) - OF_NO_ROUTE


def test_without_a_model_the_server_says_how_to_get_one(tmp_path: Path) -> None:
    with serve(tmp_path / "none") as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/").status_code == 200
        for path in ("/ready", "/api/v1/model"):
            error = assert_error(client.get(path), 503, "no_model")
            assert "python backend/train_model.py --sample" in error["detail"]
        error = assert_error(ask(client, encode(plate())), 503, "no_model")
        assert "python backend/train_model.py --sample" in error["detail"]
        assert client.get("/api/v1/foods/apple_pie").status_code == 200


def test_a_damaged_model_is_not_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    release_model(tmp_path, ["apple_pie", "samosa", "jalebi"])
    flip_a_byte(tmp_path / weights_name(1))
    with serve(tmp_path) as client:
        error = assert_error(client.get("/ready"), 503, "no_model")
    assert "damaged" in error["detail"]
    assert "damaged" in caplog.text


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["abc-123", "A.b_c", "x" * 64])
def test_a_harmless_request_id_is_kept(given: str, client: TestClient) -> None:
    response = client.get("/health", headers={"X-Request-ID": given})
    assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "<script>", '"}\\n{"'])
def test_any_other_is_replaced(given: str, client: TestClient) -> None:
    ids = {
        client.get("/health", headers={"X-Request-ID": given}).headers["x-request-id"]
        for _ in range(2)
    }
    assert len(ids) == 2 and all(len(made) == 32 for made in ids)


def test_a_request_is_one_json_line_without_anything_of_the_photo(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    exif = Image.Exif()
    exif[0x010E] = "MY-CAPTION"
    exif.get_ifd(0x8825)[1] = "GPS-SECRET"
    photo = encode(plate(), "JPEG", exif=exif)
    assert b"GPS-SECRET" in photo
    with caplog.at_level(logging.INFO, "app.middleware"):
        ask(client, photo, 'no"\nme.jpg', **{"X-Request-ID": "r-1"})
        client.get("/a%0Ab%22")
    lines = [
        JsonFormatter().format(record)
        for record in caplog.records
        if record.name == "app.middleware"
    ]
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    first, second = map(json.loads, lines)
    assert first.pop("duration_ms") > 0 and first.pop("time").endswith("+00:00")
    assert first == {
        **{"level": "info", "message": "request", "request_id": "r-1", "client": "testclient"},
        **{
            "method": "POST",
            "path": "/api/v1/predict",
            "status": 200,
            "verdict": "unsure",
            "model_version": 1,
        },
    }
    assert (second["path"], second["error_code"]) == ('/a\nb"', "not_found")
    assert not any(word in caplog.text for word in ("SECRET", "CAPTION", "me.jpg"))


def test_only_named_origins_may_call(client: TestClient) -> None:
    allowed = client.get("/health", headers={"Origin": "https://app.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    other = client.get("/health", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_the_page_allows_no_outside_request(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in ("style.css", "app.js", "icon.svg"):
        assert f"static/{name}" in page.text
        source = client.get(f"/static/{name}")
        assert source.status_code == 200
        assert "https://" not in source.text


def test_metrics_count_what_happened(model_dir: Path) -> None:
    with serve(model_dir) as client:
        ask(client, encode(plate()))
        ask(client, b"nothing")
        client.get("/somewhere/else")
        text = client.get("/metrics").text
    for line in (
        'nutrilearn_stage_seconds_count{stage="queue"} 2.0',
        'nutrilearn_stage_seconds_count{stage="decode"} 2.0',
        'nutrilearn_stage_seconds_count{stage="inference"} 1.0',
        'nutrilearn_stage_seconds_count{stage="total"} 2.0',
        'nutrilearn_requests_total{method="POST",route="/api/v1/predict",status="200"} 1.0',
        'nutrilearn_requests_total{method="GET",route="none",status="404"} 1.0',
        'nutrilearn_refusals_total{code="unsupported_image"} 1.0',
        'nutrilearn_confidence_count{verdict="unsure"} 1.0',
        "nutrilearn_queue_depth 0.0",
        "nutrilearn_model_version 1.0",
    ):
        assert line in text


# Load -----------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_the_rest_stays_awake(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    original = load_model_for_inference(model_dir).preprocess

    def wait_first(_: object, data: bytes) -> torch.Tensor:
        assert go_on.wait(30)
        return original(data)

    monkeypatch.setattr("app.ml.predictor.FoodPredictor.preprocess", wait_first)
    photo = encode(plate())
    with serve(model_dir, workers=1, queue_size=2) as client, ThreadPoolExecutor(8) as people:
        accepted = [people.submit(ask, client, photo) for _ in range(3)]
        while "nutrilearn_queue_depth 3.0" not in client.get("/metrics").text:
            time.sleep(0.01)
        refused = ask(client, photo)
        assert_error(refused, 429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
        go_on.set()
        assert [future.result().status_code for future in accepted] == [200] * 3
        assert ask(client, photo).status_code == 200


def test_refused_photos_give_their_places_back(model_dir: Path) -> None:
    with serve(model_dir, workers=1, queue_size=0) as client:
        assert {ask(client, b"no photo").status_code for _ in range(5)} == {415}
        assert ask(client, encode(plate())).status_code == 200


def _post_pieces(pieces: list[bytes], **settings: Any) -> list[dict[str, Any]]:
    """Send a body piece by piece, then nothing more, straight into the app."""
    scope = {
        **{"type": "http", "method": "POST", "path": "/api/v1/predict", "query_string": b""},
        "headers": [(b"content-type", b"multipart/form-data; boundary=x")],
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(0), "more_body": True}
        await asyncio.sleep(60)
        raise AssertionError("nobody may wait so long")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = create_app(Settings(model_dir=Path("none"), **settings))
    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


def test_a_dripping_upload_is_ended() -> None:
    start, body, *_ = _post_pieces([b"--x\r\n", b"Content"], upload_timeout_seconds=0.05)
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert json.loads(body["body"])["code"] == "upload_too_slow"


@pytest.mark.slow
def test_an_endless_upload_is_ended() -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    start, body, *_ = _post_pieces([head, *[bytes(1000)] * 50], max_upload_bytes=10_000)
    assert start["status"] == 413
    assert json.loads(body["body"])["code"] == "too_large"


# New models -----------------------------------------------------------------------------------


def reload(client: TestClient, token: str = TOKEN, **query: int) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    return client.post("/api/v1/model/reload", headers=headers, params=query)


def test_reload_needs_the_token(model_dir: Path) -> None:
    with serve(model_dir, reload_token=TOKEN) as client:
        response = client.post("/api/v1/model/reload")
        assert_error(response, 401, "wrong_token")
        assert response.headers["www-authenticate"] == "Bearer"
        assert_error(reload(client, TOKEN[:-1]), 401, "wrong_token")
        assert reload(client).status_code == 200


def test_a_device_that_is_not_there_is_named_with_its_setting(model_dir: Path) -> None:
    for device in ("xpu", "cuda:99999999999999999999"):
        with serve(model_dir, device=device) as client:
            response = client.get("/ready")
            assert_error(response, 503, "no_model")
            detail = response.json()["detail"]
            assert detail.startswith(f"NUTRILEARN_DEVICE is {device}: ")
            assert detail.endswith("; set it to cpu")


def test_settings_that_are_no_text_are_no_fault_of_the_server(tmp_path: Path) -> None:
    """Bytes of the environment that are not UTF-8 arrive as lone surrogates."""
    with serve(tmp_path / "photos\udcff", reload_token="\udcff" * 16) as client:
        response = client.get("/ready")
        assert_error(response, 503, "no_model")
        assert "photos\\udcff" in response.json()["detail"]
        assert_error(reload(client), 401, "wrong_token")


@pytest.mark.slow
def test_reload_under_load_then_roll_back(two_versions: Path) -> None:
    photo, stop = encode(plate()), threading.Event()
    settings = {"reload_token": TOKEN, "model_version": 1, "workers": 2, "queue_size": 64}

    def keep_asking(client: TestClient) -> list[tuple[int, str]]:
        answers = []
        while not stop.is_set():
            response = ask(client, photo)
            answers.append((response.status_code, response.headers["x-model-version"]))
        return answers

    with serve(two_versions, **settings) as client, ThreadPoolExecutor(4) as people:
        asking = [people.submit(keep_asking, client) for _ in range(4)]
        for version in (2, 1, 2):
            info = reload(client, version=version).json()
            assert info["version"] == client.get("/ready").json()["model_version"] == version
        stop.set()
        answers = [answer for future in asking for answer in future.result()]
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} == {"1", "2"}


def test_reload_without_a_version_keeps_the_pin(two_versions: Path) -> None:
    with serve(two_versions, reload_token=TOKEN, model_version=1) as client:
        assert reload(client).json()["version"] == 1


@pytest.mark.parametrize("harm", ["flipped byte", "wrong head", "no such version", "not finite"])
def test_a_bad_model_leaves_the_old_one_serving(
    harm: str, two_versions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(two_versions, reload_token=TOKEN, model_version=1) as client:
        if harm == "flipped byte":
            flip_a_byte(two_versions / weights_name(2))
        elif harm == "wrong head":
            path = two_versions / "food_model_v2.json"
            record = json.loads(path.read_text())
            record["class_to_idx"]["extra"] = 4
            path.write_text(json.dumps(record))
        elif harm == "not finite":
            nan = torch.full((1, 4), float("nan"))
            monkeypatch.setattr("app.ml.predictor.FoodPredictor.logits", lambda *_: nan)
        refused = reload(client, version=9 if harm == "no such version" else 2)
        monkeypatch.undo()
        error = assert_error(refused, 409, "model_rejected")
        assert error["detail"].endswith("version 1 keeps serving")
        assert ask(client, encode(plate())).json()["model_version"] == 1
        assert 'model_loads_total{outcome="failed"} 1.0' in client.get("/metrics").text


def version_becomes(client: TestClient, version: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        response = client.get("/ready")
        if response.is_success and response.json()["model_version"] == version:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.slow
def test_a_watched_folder_serves_what_is_released(tmp_path: Path) -> None:
    with serve(tmp_path, reload_poll_seconds=0.02) as client:
        assert client.get("/ready").status_code == 503
        release_model(tmp_path, ["apple_pie", "samosa", "jalebi"])
        assert version_becomes(client, 1)
        release_model(tmp_path, ["apple_pie", "samosa", "jalebi"], seed=1)
        assert version_becomes(client, 2)


@pytest.mark.parametrize("at_start", ["loads", "fails"])
def test_what_is_released_while_the_server_starts_is_served_too(
    at_start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looked at the folder only after the first load would take it for what was loaded."""
    classes = ["apple_pie", "samosa", "jalebi"]
    calls = 0

    def loading(*places: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        found = load_model_for_inference(*places, **options)
        if calls == 1:
            release_model(tmp_path, classes, standin.NAME, seed=1)
            if at_start == "fails":
                raise OSError("a share that was away for a moment")
        return found

    monkeypatch.setattr("app.inference.load_model_for_inference", loading)
    with standin.registered():
        release_model(tmp_path, classes, standin.NAME)
        with serve(tmp_path, reload_poll_seconds=0.02) as client:
            assert version_becomes(client, 2)


@pytest.fixture
def forms_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Version 1 without an INT8 form, version 2 with one, which counts as faster here."""
    standin.register()
    for with_int8 in (False, True):
        release_forms(tmp_path / "models", ["apple_pie", "samosa", "jalebi"], with_int8=with_int8)
    monkeypatch.setattr("app.ml.predictor.seconds_per_image", lambda _: {"onnx": 2.0, "int8": 1.0})
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("setting", "runtime"),
    [("auto", "int8"), ("int8", "int8"), ("onnx", "onnx"), ("torch", "torch")],
)
def test_the_form_that_answers_is_chosen_and_said(
    setting: str, runtime: str, forms_dir: Path
) -> None:
    with serve(forms_dir, runtime=setting) as client:
        info = client.get("/api/v1/model").json()
        answer = ask(client, encode(plate())).json()
    assert info["runtime"] == runtime
    record = read_record(forms_dir)
    assert info["metrics"] == record.metrics_of(runtime)
    assert (info["metrics"] == record.metrics) == (runtime != "int8")
    model = load_model_for_inference(forms_dir, runtime=runtime)
    expected = model.predict(encode(plate()))
    assert answer["confidence"] == pytest.approx(expected.top[0].probability, abs=1e-5)
    assert answer["verdict"] == expected.verdict == ("confident" if runtime == "int8" else "unsure")


def test_versions_with_and_without_the_int8_form_replace_each_other_under_load(
    forms_dir: Path,
) -> None:
    photo, stop = encode(plate()), threading.Event()

    def keep_asking(client: TestClient) -> set[int]:
        statuses = set()
        while not stop.is_set():
            statuses.add(ask(client, photo).status_code)
        return statuses

    with serve(forms_dir, reload_token=TOKEN, workers=2) as client, ThreadPoolExecutor(4) as people:
        asking = [people.submit(keep_asking, client) for _ in range(4)]
        for version, runtime in ((1, "onnx"), (2, "int8"), (1, "onnx"), (2, "int8")):
            info = reload(client, version=version).json()
            assert (info["version"], info["runtime"]) == (version, runtime)
        stop.set()
        assert {status for future in asking for status in future.result()} == {200}


def test_a_version_without_the_form_that_was_chosen_is_not_served(forms_dir: Path) -> None:
    missing = "version 1 in models has no int8 form; it has: torch, onnx"
    with serve(forms_dir, runtime="int8", reload_token=TOKEN) as client:
        error = assert_error(reload(client, version=1), 409, "model_rejected")
        assert error["detail"] == f"{missing}; version 2 keeps serving"
    with serve(forms_dir, runtime="int8", model_version=1) as client:
        assert missing in client.get("/ready").json()["detail"]


def test_the_model_is_described(client: TestClient) -> None:
    info = client.get("/api/v1/model").json()
    assert (info["version"], info["model_name"]) == (1, "mobilenet_v2")
    assert info["classes"] == ["apple_pie", "samosa", "jalebi"]
    assert info["metrics"] == {"top1": 0.5}
    assert "training" not in info  # holds the paths of the machine that trained
