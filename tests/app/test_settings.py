"""The settings: where they come from, what is a mistake, and what is not ours."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from app.ml.predictor import Runtime
from app.settings import ENV_PREFIX, Settings, SettingsError, load_settings

BACKEND = Path(__file__).resolve().parents[2] / "backend"
TOKEN = "a-token-of-sixteen-or-more"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def loaded(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    for name, value in values.items():
        monkeypatch.setenv(f"{ENV_PREFIX}{name}", value)
    return load_settings()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    origins = "https://a.example, http://localhost:3000"
    settings = loaded(monkeypatch, CORS_ORIGINS=origins, WORKERS="3")
    assert settings.cors_origins == ["https://a.example", "http://localhost:3000"]
    assert settings.workers == 3 and settings.threads >= 1
    assert settings.model_dir == BACKEND.parent / "ml-models"


def test_every_form_of_a_model_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(monkeypatch).runtime == "auto"
    for runtime in get_args(Runtime):
        assert loaded(monkeypatch, RUNTIME=runtime).runtime == runtime


def test_all_cores_that_may_be_used_have_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in [(1, 1), (2, 3), (6, 7), (256, 256), (512, 256)]:
        monkeypatch.setattr("app.settings.num_cores", lambda cores=cores: cores)
        assert loaded(monkeypatch).workers == workers
    monkeypatch.setattr("app.settings.num_cores", lambda: 6)
    assert loaded(monkeypatch).threads == 1
    assert loaded(monkeypatch, WORKERS="2").threads == 3
    assert loaded(monkeypatch, WORKERS="7").threads == 1
    monkeypatch.setattr("app.settings.num_cores", lambda: 64)
    assert loaded(monkeypatch, WORKERS="1").threads == 4  # more make one photo dearer, not faster


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORKERS", value) for value in ("0", "-1", "257", "two", "1_0", "2.5")),
        ("QUEUE_SIZE", "-1"),
        ("MAX_UPLOAD_BYTES", "20MB"),
        *(("UPLOAD_TIMEOUT_SECONDS", value) for value in ("0", "nan", "inf", "1_0", "soon")),
        ("RELOAD_POLL_SECONDS", "-0.1"),
        ("DEVICE", "gpu"),
        ("RUNTIME", "int4"),
        ("RELOAD_TOKEN", "hunter2"),
        ("MODEL_VERSION", "newest"),
        ("OFFLINE_DIR", "no-such-folder"),
        *(
            ("CORS_ORIGINS", value)
            for value in (
                *("*", "https://*.example.org", "https://a.example/path", "a.example", "//a"),
                *("https://", "https://a.example:port", "https://me:secret-word@a.example"),
            )
        ),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingsError, match=f"^{ENV_PREFIX}{name} is ") as caught:
        loaded(monkeypatch, **{name: value})
    assert "\n" not in str(caught.value)
    if name == "RELOAD_TOKEN" or "secret" in value:
        assert not any(secret in str(caught.value) for secret in ("hunter2", "secret-word"))
    else:
        assert value in str(caught.value)


def test_all_bad_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"WORKERS is 'x'.*; NUTRILEARN_QUEUE_SIZE is 'y'"):
        loaded(monkeypatch, WORKERS="x", QUEUE_SIZE="y")


@pytest.mark.parametrize("value", ["", " ", '""', "''", '" "'])
def test_an_empty_value_is_the_default(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name.upper(): value for name in Settings.model_fields}
    assert loaded(monkeypatch, **names) == Settings()


@pytest.mark.parametrize("form", ["{}", " {}\t", '"{}"', "'{}'", '" {} "', "{}\r"])
def test_what_env_files_leave_around_a_value_is_taken_off(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "WORKERS": "3",
        "RELOAD_TOKEN": TOKEN,
        "MODEL_DIR": "/srv/my models",
        "CORS_ORIGINS": "https://a.example,https://b.example",
        "UPLOAD_TIMEOUT_SECONDS": "2.5",
    }
    settings = loaded(monkeypatch, **{name: form.format(v) for name, v in values.items()})
    assert settings.workers == 3
    assert settings.reload_token and settings.reload_token.get_secret_value() == TOKEN
    assert settings.model_dir == Path("/srv/my models")
    assert settings.cors_origins == ["https://a.example", "https://b.example"]
    assert settings.upload_timeout_seconds == 2.5


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loaded(monkeypatch, MODEL_DIR="~/models").model_dir == Path.home() / "models"
    assert loaded(monkeypatch, MODEL_DIR="~no-such-user/m").model_dir == Path("~no-such-user/m")


@pytest.mark.parametrize(
    ("given", "sent_by_browsers"),
    [
        ("capacitor://localhost", "capacitor://localhost"),
        ("ionic://localhost", "ionic://localhost"),
        ("app://localhost", "app://localhost"),
        ("tauri://localhost", "tauri://localhost"),
        ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
        ("null", "null"),
        ("HTTPS://App.Example", "https://app.example"),
        ("https://app.example/", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80", "http://app.example"),
        ("https://app.example:80", "https://app.example:80"),
        ("http://192.168.1.7:8100", "http://192.168.1.7:8100"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("https://müller.example", "https://xn--mller-kva.example"),
        (" https://a.example , , http://b ,", "https://a.example,http://b"),
    ],
)
def test_an_origin_is_kept_as_browsers_send_it(
    given: str, sent_by_browsers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded(monkeypatch, CORS_ORIGINS=given).cors_origins == sent_by_browsers.split(",")


# Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["MODLE_DIR", "WORKER", "CORS_ORIGIN", "PORTS", "SERVICE", "X"])
def test_a_misspelt_setting_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=rf"NUTRILEARN_{name}\b.*known: .*NUTRILEARN_MODEL_DIR"):
        loaded(monkeypatch, **{name: "secret-value"})


def test_the_setting_that_was_probably_meant_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"MODLE_DIR \(did you mean NUTRILEARN_MODEL_DIR\?\)"):
        loaded(monkeypatch, MODLE_DIR="x")


@pytest.mark.parametrize("service", ["", "API_", "FOOD_API_V2_"])
def test_what_an_orchestrator_sets_for_a_service_is_not_ours(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "SERVICE_HOST": "10.96.0.7",
        "SERVICE_PORT": "8000",
        "SERVICE_PORT_HTTP": "8000",
        "SERVICE_PORT_HTTP_METRICS": "9000",
        "PORT": "tcp://10.96.0.7:8000",
        "PORT_8000_TCP": "tcp://10.96.0.7:8000",
        "PORT_8000_TCP_PROTO": "tcp",
        "PORT_8000_TCP_PORT": "8000",
        "PORT_8000_TCP_ADDR": "10.96.0.7",
        "PORT_53_UDP": "udp://10.96.0.7:53",
        "PORT_53_UDP_ADDR": "10.96.0.7",
        "PORT_9_SCTP_PROTO": "sctp",
    }
    assert loaded(monkeypatch, **{f"{service}{n}": v for n, v in values.items()}) == Settings()


def test_links_of_containers_and_the_switch_of_the_tests_are_not_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"NAME": "/web/nutrilearn", "ENV_PATH": "/usr/bin", "LONG_TESTS": "1"}
    assert loaded(monkeypatch, **values) == Settings()


def test_the_token_is_never_shown() -> None:
    assert TOKEN not in repr(Settings(reload_token=TOKEN))  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_start_ends_with_one_line() -> None:
    environment = {**os.environ, "NUTRILEARN_RELOAD_TOKEN": "secret", "NUTRILEARN_WORKERS": "two"}
    result = subprocess.run(
        [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"],
        cwd=BACKEND,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("the server cannot start: NUTRILEARN_WORKERS is 'two': ")
    assert "NUTRILEARN_RELOAD_TOKEN" in line and "secret" not in result.stdout + line
