"""Addresses: SQLite files with any name, and text that is free of passwords."""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>.*?)(?P<options>\?\w+=.*)?", re.DOTALL)
HIDDEN = "***"
SECRET_NAME = (
    r"[\w.-]*(?:passw(?:or)?d|passphrase|pwd|token|secret|credential|signature|"
    r"(?:api|access|account|private|secret)[_-]?key)|pass|sig|key"
)
USER = r":/{1,2}[^\s:/@\[]*"  # pathlib makes one slash of two
SECRETS = [  # (what to find, what to put there)
    # user:password@ in one word; for http, digits and a slash are a port and the path
    (rf"(?<!https)(?<!http)({USER}):\S*@", rf"\1:{HIDDEN}@"),
    (rf"(https?{USER}):(?!\d{{1,5}}/)\S*@", rf"\1:{HIDDEN}@"),
    (rf"({USER}):(?!\d{{1,5}}\b)[^\n]*?@", rf"\1:{HIDDEN}@"),  # with spaces in it
    (r"(://)[^\s:/@]{16,}@", rf"\1{HIDDEN}@"),  # a token in place of a user
    (r"(?i)(%3A%2F%2F(?:(?!%3A|%2F)[^\s@])*%3A)\S*?%40", rf"\1{HIDDEN}%40"),  # percent-encoded
    (
        rf"(?i)(?<![\w.-])({SECRET_NAME})=(?!\s)(?:'[^']*'|\"[^\"]*\"|[^&;#\s'\"]+)",
        rf"\1={HIDDEN}",
    ),
    (rf"(?i)(?<![a-z])({SECRET_NAME})%3D(?:(?!%3B|%26)[^\s&;#'\"])+", rf"\1%3D{HIDDEN}"),
    (r"\b(Bearer|Basic) [^\n'\"]+", rf"\1 {HIDDEN}"),  # an Authorization header
]
SHORTEST_SECRET = 6  # hiding a shorter one would blacken parts of ordinary words


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite file.

    Only `%`, `?` and `#` are encoded, where SQLAlchemy would cut or decode the path.
    """
    return "sqlite:///" + re.sub("[%?#]", lambda found: quote(found[0]), path.as_posix())


def database_file(uri: str) -> Path | None:
    """Return the file of a SQLite URI, absolute; None for any other store.

    A `?` begins options only where `name=` follows; otherwise it belongs to the path.
    """
    found = SQLITE.fullmatch(uri)
    return Path(unquote(found["path"])).absolute() if found else None


def absolute_uri(uri: str) -> str:
    """Return the URI with the path of a SQLite file made absolute, to be found from any folder."""
    database, found = database_file(uri), SQLITE.fullmatch(uri)
    return sqlite_uri(database) + (found["options"] or "") if database and found else uri


def without_password(text: str) -> str:
    """Hide every password and token in a text: those of URIs, and this process's own.

    Its own are the values of environment variables with names such as MLFLOW_TRACKING_TOKEN, and
    the passwords of URIs in any variable.
    """
    for pattern, replacement in SECRETS:
        text = re.sub(pattern, replacement, text)
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    return text


def _environment_secrets() -> list[str]:
    """The longest first: one may be part of another."""
    secrets = set()
    for name, value in os.environ.items():
        if re.fullmatch(f"(?i){SECRET_NAME}", name) and name not in ("PWD", "OLDPWD"):
            secrets.add(value)
        for password in re.findall(rf"{USER}:(\S+)@", value):
            secrets |= {password, unquote(password)}
    return sorted((s for s in secrets if len(s) >= SHORTEST_SECRET), key=len, reverse=True)
