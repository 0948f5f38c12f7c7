"""The last answers: remembered by request id, and compared with those to the validation photos."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from tests.support.released import release_model

from app.answers import Answer, RecentAnswers, UnknownAnswerError
from app.main import create_app
from app.ml.artifacts import Decision, make_current, read_record
from app.ml.drift import RECORD_KEY, sum_up
from app.settings import Settings

DISHES = ["apple_pie", "samosa", "jalebi"]
TOKEN = "a-token-of-sixteen-or-more"


def ask(client: TestClient, **options: Any) -> Any:
    Image.new("RGB", (64, 48), "red").save(buffer := io.BytesIO(), "PNG")
    files = {"file": buffer.getvalue()}
    return client.post("/api/v1/predict", files=files, **options).json()


def drift(client: TestClient) -> Any:
    return client.get("/api/v1/model").json()["drift"]


def gauge(client: TestClient, name: str) -> float | None:
    lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(f"nutrilearn_drift_{name} ")]
    return float(found[0].split()[-1]) if found else None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """v1 without a reference; v2, current, was sure of its 200 validation photos."""
    release_model(tmp_path, DISHES)
    reference = sum_up([0.95] * 200, ["confident"] * 190 + ["not_food"] * 10)
    decision = Decision(1.0, confident_at=1.1, food_at=-1.0)
    release_model(tmp_path, DISHES, decision=decision, metrics={RECORD_KEY: reference})
    return tmp_path


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    app = create_app(Settings(model_dir=folder, workers=1, reload_token=TOKEN))  # type: ignore[arg-type]
    with TestClient(app) as client:
        yield client


def test_drift_is_told_in_both_places(client: TestClient) -> None:
    assert drift(client) is None
    assert gauge(client, "answers") == 0
    answers = [ask(client) for _ in range(3)]
    told = drift(client)
    assert told["answers"] == gauge(client, "answers") == 3
    assert told["stability_index"] == pytest.approx(gauge(client, "stability_index"))
    assert told["stability_index"] > 0.25  # a model with random weights is sure of nothing
    mean = sum(answer["confidence"] for answer in answers) / 3
    assert told["mean_confidence"] == {
        "answers": pytest.approx(mean),
        "validation": pytest.approx(0.95),
    }
    assert gauge(client, 'mean_confidence{of="validation"}') == pytest.approx(0.95)
    assert told["verdicts"]["unsure"] == {"answers": 1.0, "validation": 0.0}
    assert told["verdicts"]["confident"] == {"answers": 0.0, "validation": 0.95}
    assert gauge(client, 'verdict_share{of="answers",verdict="unsure"}') == 1


def test_a_photo_that_is_asked_about_again_counts_once(client: TestClient) -> None:
    """As the page does it to see where the network looked: with the id of the first answer."""
    again = {"headers": {"X-Request-ID": "the-first"}}
    first = ask(client, **again)
    explained = ask(client, **again, params={"explain": True})
    assert explained["confidence"] == first["confidence"]
    assert drift(client)["answers"] == 1
    assert 'nutrilearn_confidence_count{verdict="unsure"} 1.0' in client.get("/metrics").text


def test_another_version_begins_anew(client: TestClient, folder: Path) -> None:
    ask(client)
    assert gauge(client, 'mean_confidence{of="answers"}') is not None
    make_current(folder, read_record(folder, 1))
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert client.post("/api/v1/model/reload", headers=headers).json()["version"] == 1
    ask(client)
    assert drift(client) is None  # released before the reference was recorded
    assert gauge(client, "answers") == 0
    assert gauge(client, 'mean_confidence{of="answers"}') is None


def test_the_last_answers_count_even_under_one_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.answers.REMEMBERED", 3)
    answers = RecentAnswers()
    for number in range(5):
        answers.add("same", Answer(1, "dosa", number / 10, "unsure"))
    assert answers.to("same").confidence == 0.4
    summary = answers.summary(1)
    assert summary and summary["count"] == 3
    assert summary["mean_confidence"] == pytest.approx(0.3)
    assert answers.summary(2) is None
    with pytest.raises(UnknownAnswerError, match="'other'"):
        answers.to("other")
