"""SQLite URIs of files with any name, and texts without passwords."""

import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from training.uris import absolute_uri, database_file, sqlite_uri, without_password

NAMES = ["plain", "my food", "my%20food", "what?food", "ha#sh", "50%", "Grüße", "a?b=c", "a@b:c"]


@pytest.mark.parametrize("name", NAMES)
def test_a_sqlite_uri_names_its_file(name: str) -> None:
    path = Path("/somewhere") / name / "mlflow.db"
    uri = sqlite_uri(path)
    assert database_file(uri) == path
    assert absolute_uri(uri) == uri
    assert make_url(uri).database == str(path), "what SQLAlchemy 2.1 opens"


def test_plain_paths_stay_readable() -> None:
    assert sqlite_uri(Path("/home/Jörg K/mlflow.db")) == "sqlite:////home/Jörg K/mlflow.db"


@pytest.mark.parametrize(
    ("typed", "file", "absolute"),
    [
        ("sqlite:///x.db", "x.db", "sqlite:///{cwd}/x.db"),
        ("sqlite:///a/x.db?timeout=5", "a/x.db", "sqlite:///{cwd}/a/x.db?timeout=5"),
        ("sqlite+pysqlite:///x.db", "x.db", "sqlite:///{cwd}/x.db"),
        ("sqlite:///what?food/x.db", "what?food/x.db", "sqlite:///{cwd}/what%3Ffood/x.db"),
    ],
)
def test_relative_paths_become_absolute(
    typed: str, file: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert database_file(typed) == tmp_path / file
    assert absolute_uri(typed) == absolute.format(cwd=tmp_path)


@pytest.mark.parametrize("uri", ["http://host:5000", "postgresql://host/db", "databricks", "x"])
def test_other_stores_have_no_file(uri: str) -> None:
    assert database_file(uri) is None
    assert absolute_uri(uri) == uri


SHOWN = {
    "http://me:secret@host:5000/x": "http://me:***@host:5000/x",
    "http://me:s3@cr@et@host": "http://me:***@host",
    "http://me:it's secret@host": "http://me:***@host",
    "http://me:12345@host:5000": "http://me:***@host:5000",
    "http://me:secret@[::1]:5000": "http://me:***@[::1]:5000",
    "http:/me:secret@host": "http:/me:***@host",
    "http://:secret@host": "http://:***@host",
    "https://ghp_0123456789abcdef@host/x": "https://***@host/x",
    "postgresql+psycopg2://me:s/e@h:5432/db": "postgresql+psycopg2://me:***@h:5432/db",
    "mysql://h/db?user=me&password=se%26cret&x=1": "mysql://h/db?user=me&password=***&x=1",
    "https://h?api_key=secret": "https://h?api_key=***",
    "https://h?ACCESS_TOKEN=secret#there": "https://h?ACCESS_TOKEN=***#there",
    "https://x.example/c?sv=1&sig=se%2Fcret&se=3": "https://x.example/c?sv=1&sig=***&se=3",
    "mssql+pyodbc:///?odbc_connect=UID%3Dsa%3BPWD%3Dse%23cret%3BX%3D1": (
        "mssql+pyodbc:///?odbc_connect=UID%3Dsa%3BPWD%3D***%3BX%3D1"
    ),
    "x?db=postgresql%3A%2F%2Fme%3Asecret%40host%2Fdb": (
        "x?db=postgresql%3A%2F%2Fme%3A***%40host%2Fdb"
    ),
    "password='two words' host=x": "password=*** host=x",
    "header value: 'Bearer secret\\n'": "header value: 'Bearer ***'",
}
NOTHING_TO_HIDE = [
    "http://host:5000",
    "http://host:5000/@me",
    "http://me@host:5000",
    "http://[::1]:5000/x@y",
    "http://host:5000: Max retries exceeded; ask admin@example.org",
    "sqlite:////home/a@b/c:d/mlflow.db",
    "sqlite:///C:/Users/me@home/mlflow.db",
    "data cache_images=on num_workers=2",
    "python backend/train_model.py --learning_rate=0.1 --classes a,b",
]


@pytest.mark.parametrize(("text", "shown"), SHOWN.items())
def test_every_form_of_password_is_hidden(text: str, shown: str) -> None:
    assert without_password(text) == shown
    assert without_password(shown) == shown


@pytest.mark.parametrize("text", NOTHING_TO_HIDE)
def test_the_rest_of_a_text_stays(text: str) -> None:
    assert without_password(text) == text


@settings(max_examples=200, deadline=None)
@given(
    password=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=6, max_size=20),
    quoted=st.booleans(),
)
def test_no_password_is_seen_in_a_command(password: str, quoted: bool) -> None:
    uri = f"postgresql://me:{password}@host.example.org:5432/food"
    words = ["python", "train_model.py", "--tracking_uri", uri, "--epochs", "3"]
    shown = without_password(shlex.join(words) if quoted else " ".join(words))
    words[3] = "postgresql://me:***@host.example.org:5432/food"
    assert shown.replace("'", "") == " ".join(words)  # quotes may stay around the address


def test_this_processes_own_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "eyJhbGciOi")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p%40ssword@host")
    monkeypatch.setenv("PWD", "/home/me/food")
    text = "eyJhbGciOi wJalrXUtnFEMI p%40ssword p@ssword /home/me/food"
    assert without_password(text) == "*** *** *** *** /home/me/food"
