"""The server's settings, each an environment variable NUTRILEARN_<NAME>."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticUseDefault
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.ml.forms import Runtime
from app.ml.machine import memory_limit, num_cores

ENV_PREFIX = "NUTRILEARN_"
MODEL_DIR = Path(__file__).resolve().parents[2] / "ml-models"
MEBIBYTE = 2**20
# CPU time of one photo on two free cores: 13 ms with 1 thread, 18 with 4, 24 with 8, 39 with 32.
MAX_THREADS = 4
MAX_WORKERS = 256

# Names with our prefix that are somebody else's: what Kubernetes and Docker write for a service or
# a container that is called "nutrilearn" (or "nutrilearn-..."), and the switch of the test suite.
FOREIGN = re.compile(
    r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
    r"|NAME|ENV_\w+|LONG_TESTS"
)
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s/?#@:*\[\]]+)(:\d{1,5})?")
DEFAULT_PORTS = {("http", ":80"), ("https", ":443")}
# What a browser needs of npm's onnxruntime-web, with the types that it insists on.
BROWSER_RUNTIME = {
    "ort.wasm.bundle.min.mjs": "text/javascript",
    "ort-wasm-simd-threaded.wasm": "application/wasm",
}


class SettingsError(ValueError):
    """The environment holds a setting that is misspelled or cannot be used; one line says which."""


def plain_number(value: Any) -> Any:
    """Refuse 1_000, which Python reads as a number and nobody means as one."""
    if isinstance(value, str) and "_" in value:
        raise ValueError("a number is written without _")
    return value


Integer = Annotated[int, BeforeValidator(plain_number)]
Seconds = Annotated[float, BeforeValidator(plain_number), Field(allow_inf_nan=False)]


def _default_workers() -> int:
    """Return one more than the cores, if there are several: one waits for Python's lock now and
    then, and its core would wait too, for an eighth of the time."""
    cores = num_cores()
    return min(cores + 1, MAX_WORKERS) if cores > 1 else 1


def _default_upload_memory() -> int:
    """Return an eighth of the memory, at most 512 MiB, which holds a hundred photos of a phone."""
    limit = memory_limit()
    return 512 * MEBIBYTE if limit is None else min(512 * MEBIBYTE, limit // 8)


class Settings(BaseSettings):
    """Read once, when the app is created; a bad or unknown variable stops the start."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True)

    model_dir: Path = Field(default=MODEL_DIR, description="folder of the released models")
    model_version: Integer | None = Field(
        default=None, ge=1, description="serve this version, not the current one"
    )
    device: str = Field(default="cpu", description="where to compute: cpu, cuda, mps")
    runtime: Runtime | Literal["auto"] = Field(
        default="auto", description="form of the model that answers; auto is the fastest here"
    )
    workers: Integer = Field(
        default_factory=_default_workers,
        ge=1,
        le=MAX_WORKERS,
        description="photos computed at once",
    )
    queue_size: Integer = Field(
        default=64, ge=0, description="photos that may wait; more are answered 429"
    )
    max_upload_bytes: Integer = Field(
        default=20 * MEBIBYTE, ge=1, description="largest request body"
    )
    upload_memory_bytes: Integer = Field(
        default_factory=_default_upload_memory,
        ge=1,
        description="bytes of all uploads held at once; more are answered 429",
    )
    upload_timeout_seconds: Seconds = Field(
        default=60, gt=0, description="time a body may take to arrive"
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        default=[], description="origins whose pages may call the API, separated by commas"
    )
    reload_token: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="bearer token of reloading and of reviewing corrections; off without",
    )
    feedback_dir: Path | None = Field(
        default=None, description="folder for the corrections that people send; off without"
    )
    feedback_max_photos: Integer = Field(
        default=1000, ge=1, description="corrections that may wait to be reviewed"
    )
    feedback_max_bytes: Integer = Field(
        default=512 * MEBIBYTE, ge=1, description="bytes of the photos that wait to be reviewed"
    )
    feedback_per_minute: Integer = Field(
        default=20, ge=1, description="corrections that one client may send in a minute"
    )
    reload_poll_seconds: Seconds = Field(
        default=0, ge=0, description="how often to look for a newly released model; 0 is never"
    )
    offline_dir: Path | None = Field(
        default=None,
        description="folder of onnxruntime-web, with which the page answers by itself; off without",
    )

    @property
    def threads(self) -> int:
        """Return the threads for one photo: the cores shared among the workers, at least one."""
        return max(1, min(MAX_THREADS, num_cores() // self.workers))

    @field_validator("model_dir", "feedback_dir", "offline_dir")
    @classmethod
    def _expand_home(cls, folder: Path | None) -> Path | None:
        if folder is None:
            return None
        return Path(os.path.expanduser(folder))  # Path's own raises for a user who is not there

    @field_validator("offline_dir")
    @classmethod
    def _check_browser_runtime(cls, folder: Path | None) -> Path | None:
        if folder and not all((folder / name).is_file() for name in BROWSER_RUNTIME):
            raise ValueError(
                f"there is no {' or no '.join(BROWSER_RUNTIME)}; fetch them with npm install "
                "onnxruntime-web and give the folder node_modules/onnxruntime-web/dist"
            )
        return folder

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
            raise ValueError("use cpu, cuda, cuda:1 or mps")
        return device

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_send_them(cls, origins: list[str]) -> list[str]:
        return [_canonical(origin) for origin in origins if origin]

    # Validators that come before the type's run from the last to the first.
    @field_validator("*", mode="before")
    @classmethod
    def _clean(cls, value: Any) -> Any:
        """Take off the spaces and quotes that env files leave; nothing at all is the default."""
        if not isinstance(value, str):
            return value
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1].strip()
        if not value:
            raise PydanticUseDefault
        return value


def _canonical(origin: str) -> str:
    """Write an origin as browsers do: in lower case, without a default port or a final slash.

    `null` is the origin of pages that were opened from a file.
    """
    if origin == "null":
        return origin
    match = ORIGIN.fullmatch(origin.lower().removesuffix("/"))
    if match is None:
        raise ValueError(
            f"{_without_password(origin)!r} is not an origin; write each as https://example.org, "
            "without path or wildcard"
        )
    scheme, host, port = match.groups(default="")
    host = host if host.isascii() else host.encode("idna").decode()
    return f"{scheme}://{host}{'' if (scheme, port) in DEFAULT_PORTS else port}"


def _without_password(url: str) -> str:
    return re.sub(r"//[^/]*@", "//***@", url)


def load_settings() -> Settings:
    """Read the settings of this process's environment.

    Raises:
        SettingsError: a variable with our prefix that is no setting, or a bad value.
    """
    known = sorted(f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields)
    ours = {name for name in os.environ if name.startswith(ENV_PREFIX)}
    foreign = {name for name in ours if FOREIGN.fullmatch(name.removeprefix(ENV_PREFIX))}
    if unknown := sorted(ours - foreign - set(known)):
        raise SettingsError(_unknown_names(unknown, known))
    try:
        return Settings()
    except ValidationError as error:
        problems = (_problem(dict(problem)) for problem in error.errors())
        raise SettingsError("; ".join(problems)) from None  # the cause repeats secret values


def _unknown_names(unknown: list[str], known: list[str]) -> str:
    meant = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
    named = [f"{name} (did you mean {m[0]}?)" if m else name for name, m in meant.items()]
    return f"unknown settings in the environment: {', '.join(named)}; known: {', '.join(known)}"


def _problem(error: dict[str, Any]) -> str:
    name = f"{ENV_PREFIX}{str(error['loc'][0]).upper()}"
    if name == f"{ENV_PREFIX}RELOAD_TOKEN":
        return f"{name} is too short; use 16 characters or more"
    message = error["msg"].removeprefix("Value error, ")
    message = message.replace("Input should", "it should")
    return f"{name} is {_without_password(str(error['input']))[:200]!r}: {message}"
