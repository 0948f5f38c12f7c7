"""The page that answers without the server: what the server gives it, and the page in Chromium."""

import base64
import io
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from tests.support import standin
from tests.support.released import release_forms
from tests.support.web_page import (
    DISHES,
    IN_A_BROWSER,
    Open,
    answered,
    install_onnxruntime_web,
    photo,
    server,
    upload,
)

from app.main import WEB, create_app
from app.ml.artifacts import Decision
from app.ml.predictor import load_model_for_inference, nearest_centroid
from app.ml.preprocessing import EvalTransform, PreprocessConfig, load_image, normalize
from app.settings import BROWSER_RUNTIME, Settings

READY = "When the server cannot be reached, this computer answers (model version {})."
CLOSE = 2e-3  # of a probability: decoders of JPEG differ by a gray level here and there


@pytest.fixture(autouse=True)
def stand_in() -> Iterator[None]:
    with standin.registered():
        yield


# What the server gives ------------------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A folder like that of onnxruntime-web."""
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in BROWSER_RUNTIME:
        (folder / name).write_text(f"// {name}")
    return folder


def client_of(model_dir: Path, **settings: Any) -> TestClient:
    return TestClient(create_app(Settings(model_dir=model_dir, workers=1, **settings)))


def test_nothing_is_there_while_it_is_off(tmp_path: Path) -> None:
    with client_of(tmp_path) as client:
        assert client.get("/").content == (WEB / "index.html").read_bytes()
        for path in ("/worker.js", "/offline/facts", *(f"/offline/{n}" for n in BROWSER_RUNTIME)):
            assert client.get(path).status_code == 404


def test_only_the_service_worker_may_compile_the_runtime(tmp_path: Path, runtime: Path) -> None:
    with client_of(tmp_path, offline_dir=runtime) as client, client_of(tmp_path) as off:
        page, worker = client.get("/"), client.get("/worker.js")
        assert (
            page.headers["Content-Security-Policy"]
            == off.get("/").headers["Content-Security-Policy"]
        )
        assert "'wasm-unsafe-eval'" in worker.headers["Content-Security-Policy"]
        for name, media_type in BROWSER_RUNTIME.items():
            response = client.get(f"/offline/{name}")
            assert response.headers["Content-Type"].split(";")[0] == media_type
            assert response.text == f"// {name}"


def test_another_runtime_makes_another_service_worker(tmp_path: Path, runtime: Path) -> None:
    with client_of(tmp_path, offline_dir=runtime) as client:
        before = client.get("/worker.js").text
    (runtime / "ort-wasm-simd-threaded.wasm").write_text("newer")
    with client_of(tmp_path, offline_dir=runtime) as client:
        assert client.get("/worker.js").text != before


def test_the_file_is_the_small_form_of_the_version_that_is_served(
    tmp_path: Path, runtime: Path
) -> None:
    record = release_forms(tmp_path, DISHES)
    release_forms(tmp_path, DISHES, with_int8=False)
    token = "a-token-of-sixteen-or-more"
    with client_of(tmp_path, offline_dir=runtime, reload_token=token) as client:
        facts = client.get("/offline/facts").json()
        assert facts["file"] == "offline/food_model_v2.onnx"
        headers = {"Authorization": f"Bearer {token}"}
        client.post("/api/v1/model/reload?version=1", headers=headers).raise_for_status()
        assert client.get(f"/{facts['file']}").status_code == 404  # a step back
        facts = client.get("/offline/facts").json()
        assert facts["file"] == "offline/food_model_v1.int8.onnx"
        assert facts["decision"]["temperature"] == record.decision_of("int8").temperature
        assert (
            client.get(f"/{facts['file']}").content
            == (tmp_path / "food_model_v1.int8.onnx").read_bytes()
        )
        (tmp_path / "food_model_v1.int8.onnx").write_bytes(b"damaged")
        refused = client.get(f"/{facts['file']}")
        assert (refused.status_code, refused.json()["code"]) == (503, "no_model")
        assert "food_model_v1.int8.onnx" in refused.json()["detail"]


def test_a_version_that_browsers_cannot_run_is_said(model_dir: Path, runtime: Path) -> None:
    with client_of(model_dir, offline_dir=runtime) as client:
        response = client.get("/offline/facts")
    assert response.status_code == 503  # not 404, which means that it is off
    assert response.json()["detail"] == "version 1 has no ONNX form, which browsers need"


# In Chromium ----------------------------------------------------------------------------------


def in_a_browser(test: Any) -> Any:
    for mark in (*IN_A_BROWSER, pytest.mark.slow):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def onnxruntime_web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives Chromium")
    folder = tmp_path_factory.mktemp("npm")
    yield install_onnxruntime_web(folder)
    shutil.rmtree(folder)  # 140 MB


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "ml-models"
    release_forms(folder, DISHES)
    return folder


def says(page: Any, words: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#who")).to_have_text(words, timeout=60_000)


ASK = """async (data) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const form = new FormData();
    form.append("file", new Blob([bytes], { type: "image/jpeg" }));
    const response = await fetch("api/v1/predict", { method: "POST", body: form });
    return response.json();
}"""


def ask(page: Any, data: bytes) -> dict[str, Any]:
    """What a request of the page is answered."""
    given: dict[str, Any] = page.evaluate(ASK, base64.b64encode(data).decode())
    return given


def drawn(seed: int, size: tuple[int, int] = (300, 200), **options: Any) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    image.save(buffer := io.BytesIO(), "JPEG", quality=92, **options)
    return buffer.getvalue()


def num_requests(url: str) -> int:
    """How many requests the server has had, those for its metrics aside."""
    with urllib.request.urlopen(f"{url}metrics") as response:
        lines = response.read().decode().splitlines()
    counted = [line for line in lines if line.startswith("nutrilearn_requests_total{")]
    return int(sum(float(line.split()[-1]) for line in counted if "metrics" not in line))


@in_a_browser
def test_it_answers_when_the_server_is_gone(
    visit: Open, models: Path, onnxruntime_web: Path
) -> None:
    with server(models, runtime="int8", offline_dir=onnxruntime_web) as url:
        page = visit(url)
        says(page, READY.format(1))
        upload(page, photo())
        food, guesses = answered(page), page.inner_text("#guesses")
        says(page, "The last answer came from the server.")
    page.reload()
    says(page, READY.format(1))
    assert "Model version 1 (INT8), 4 dishes." in page.inner_text("footer")
    upload(page, photo())
    assert (answered(page), page.inner_text("#guesses")) == (food, guesses)
    says(page, "The last answer came from this computer. Your photo never left it.")
    page.select_option("#other", "apple_pie")
    page.wait_for_selector("text=USDA FNDDS")
    assert page.inner_text("#calories") == "444"
    page.click("#where")
    page.wait_for_selector("text=This model cannot say.")


@in_a_browser
def test_its_answers_are_the_servers_and_nothing_leaves(
    visit: Open, models: Path, onnxruntime_web: Path
) -> None:
    photos = [drawn(seed) for seed in range(12)]
    release_forms(models, DISHES, decision=decision_between(models, photos))
    with server(models, runtime="int8", offline_dir=onnxruntime_web) as url:
        page = visit(url)
        says(page, READY.format(2))
        by_server = [ask(page, data) for data in photos]
        page.check("#only-here")
        before = num_requests(url)
        here = [ask(page, data) for data in photos]
        assert num_requests(url) == before
    for ours, theirs in zip(here, by_server, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"timestamp", "confidence", "top_predictions"}:
            assert ours[name] == theirs[name], name
        for one, other in zip(ours["top_predictions"], theirs["top_predictions"], strict=True):
            assert one["class_name"] == other["class_name"]
            assert one["confidence"] == pytest.approx(other["confidence"], abs=CLOSE)
    assert {answer["verdict"] for answer in here} == {"confident", "unsure", "not_food"}


def decision_between(models: Path, photos: list[bytes]) -> Decision:
    """Thresholds that a half of the photos reaches."""
    model = load_model_for_inference(models, runtime="int8")
    pixels = torch.stack([model.preprocess(data) for data in photos])
    logits, pooled = model.network(normalize(pixels, model.record.preprocessing))
    confidences = logits.softmax(dim=1).amax(dim=1).numpy()
    similarities = nearest_centroid(pooled, model.centroids).numpy()
    return Decision(1.0, float(np.median(confidences)), float(np.median(similarities)))


PIXELS = """async ([data, preprocessing]) => {
    const { pixelsOf } = await import("/static/recognize.js");
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    return [...await pixelsOf(new Blob([bytes], { type: "image/jpeg" }), preprocessing)];
}"""


@in_a_browser
def test_its_pixels_are_the_servers(visit: Open, models: Path, onnxruntime_web: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    photos = [drawn(1), drawn(2, (211, 340)), drawn(3, (60, 45)), drawn(4, exif=turned)]
    with server(models, offline_dir=onnxruntime_web) as url:
        page = visit(url)
        for interpolation, data in [
            *(("bilinear", data) for data in [*photos, drawn(5, (1601, 1203))]),
            *(("bicubic", data) for data in photos),
        ]:
            config = PreprocessConfig(73, 64, interpolation, (0, 0, 0), (1, 1, 1))
            encoded = base64.b64encode(data).decode()
            given = page.evaluate(PIXELS, [encoded, config.to_dict()])
            expected = EvalTransform(config)(load_image(data)).permute(1, 2, 0).flatten()
            assert np.abs(np.array(given) - expected.numpy()).max() <= 1


@in_a_browser
def test_what_the_browser_cannot_read_is_said_and_not_sent(
    visit: Open, models: Path, onnxruntime_web: Path
) -> None:
    with server(models, offline_dir=onnxruntime_web) as url:
        page = visit(url)
        says(page, READY.format(1))
        page.check("#only-here")
        before = num_requests(url)
        upload(page, b"....ftypheic", "lunch.heic")
        page.wait_for_selector("#error:visible")
        assert num_requests(url) == before
    assert "this browser cannot read the picture by itself" in page.inner_text("#error")


@in_a_browser
def test_a_correction_is_not_sent_either(
    visit: Open, models: Path, onnxruntime_web: Path, tmp_path: Path
) -> None:
    with server(models, offline_dir=onnxruntime_web, feedback_dir=tmp_path / "kept") as url:
        page = visit(url)
        says(page, READY.format(1))
        page.check("#only-here")
        upload(page, photo())
        answered(page)
        before = num_requests(url)
        page.check("#share")
        page.click("#guesses button >> nth=1")
        page.wait_for_selector("#taught:has-text('your photo stays on this device')")
        assert num_requests(url) - before == 1  # for what is known about the dish
        page.uncheck("#only-here")
        page.click("#guesses button >> nth=2")
        page.wait_for_selector("#taught:has-text('Your photo is kept')")


@in_a_browser
def test_a_new_version_replaces_the_one_that_is_kept(
    visit: Open, models: Path, onnxruntime_web: Path
) -> None:
    settings = {"offline_dir": onnxruntime_web, "reload_poll_seconds": 0.1}
    with server(models, **settings) as url:
        page = visit(url)
        says(page, READY.format(1))
        release_forms(models, DISHES, with_int8=False)
        deadline = time.monotonic() + 60
        while ask(page, photo())["model_version"] == 1 or not num_kept(page, "food_model_v2.onnx"):
            assert time.monotonic() < deadline
    assert ask(page, photo())["model_version"] == 2
    assert num_kept(page, "food_model_v1") == 0


KEPT = """async (name) => {
    const caches_ = await Promise.all((await caches.keys()).map((each) => caches.open(each)));
    const requests = (await Promise.all(caches_.map((cache) => cache.keys()))).flat();
    return requests.filter(({ url }) => url.includes(name)).length;
}"""


def num_kept(page: Any, name: str) -> int:
    return int(page.evaluate(KEPT, name))


@in_a_browser
def test_turned_off_nothing_stays(visit: Open, models: Path, onnxruntime_web: Path) -> None:
    with server(models, offline_dir=onnxruntime_web) as url:
        page = visit(url)
        says(page, READY.format(1))
        assert num_kept(page, "") > 5
    with server(models, port=int(url.strip("/").split(":")[-1])):
        page.reload()
        assert page.locator("#who").count() == 0
        deadline = time.monotonic() + 60
        while num_kept(page, "") or page.evaluate("navigator.serviceWorker.getRegistrations()"):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@in_a_browser
@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("delete Navigator.prototype.serviceWorker", "opened over HTTPS"),
        ("delete globalThis.WebAssembly", "no WebAssembly"),
        ("ServiceWorkerContainer.prototype.register = () => Promise.reject()", "by itself"),
    ],
)
def test_a_browser_that_cannot_is_told(
    missing: str, words: str, visit: Open, models: Path, onnxruntime_web: Path
) -> None:
    with server(models, offline_dir=onnxruntime_web) as url:
        page = visit(f"{url}health")
        page.add_init_script(missing)
        page.goto(url)
        page.wait_for_selector(f"#who:has-text({words!r})")
        upload(page, photo())
        assert answered(page)
        assert not page.locator("#only-here").is_visible()


@in_a_browser
def test_too_little_room_is_said(visit: Open, models: Path, onnxruntime_web: Path) -> None:
    with server(models, offline_dir=onnxruntime_web) as url:
        page = visit(f"{url}health")
        driver = page.context.new_cdp_session(page)
        driver.send("Storage.overrideQuotaForOrigin", {"origin": url, "quotaSize": 1_000_000})
        page.goto(url)
        page.wait_for_selector("#who:has-text('lack of room')")
        upload(page, photo())
        assert answered(page)


@in_a_browser
def test_it_can_be_installed(visit: Open, models: Path, onnxruntime_web: Path) -> None:
    with server(models, offline_dir=onnxruntime_web) as url:
        page = visit(url)
        says(page, READY.format(1))
        driver = page.context.new_cdp_session(page)
        assert driver.send("Page.getAppManifest")["errors"] == []
        errors = driver.send("Page.getInstallabilityErrors")["installabilityErrors"]
        assert [error["errorId"] for error in errors] == ["in-incognito"]  # as playwright's are
