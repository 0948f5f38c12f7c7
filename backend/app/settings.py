"""The server's settings, each an environment variable NUTRILEARN_<NAME>."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_PREFIX = "NUTRILEARN_"
MODEL_DIR = Path(__file__).resolve().parents[2] / "ml-models"


def available_cores() -> int:
    """Cores this process may run on; a container's CPU quota is not seen (set WORKERS there)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Settings(BaseSettings):
    """Read once, when the app is created; a bad or unknown variable stops the start."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True)

    model_dir: Path = Field(default=MODEL_DIR, description="folder of the released models")
    model_version: int | None = Field(
        default=None, ge=1, description="serve this version, not the newest"
    )
    device: str = Field(default="cpu", description="where to compute: cpu, cuda, mps")
    workers: int = Field(
        default_factory=available_cores, ge=1, le=256, description="photos computed at once"
    )
    queue_size: int = Field(
        default=64, ge=0, description="photos that may wait; more are answered 429"
    )
    max_upload_bytes: int = Field(default=20 * 2**20, ge=1, description="largest request body")
    upload_timeout_seconds: float = Field(
        default=60, gt=0, description="time a body may take to arrive"
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        default=[], description="origins whose pages may call the API, separated by commas"
    )
    reload_token: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="bearer token of POST /api/v1/model/reload; off without",
    )
    reload_poll_seconds: float = Field(
        default=0, ge=0, description="how often to look for a newly released model; 0 is never"
    )

    @property
    def threads(self) -> int:
        """Cores for one photo, so that workers x threads is the number of cores."""
        return max(1, available_cores() // self.workers)

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:
        return [v.strip() for v in value.split(",")] if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError(f"{origin!r} is no origin; write it as https://example.org")
        return origins


def load_settings() -> Settings:
    """The settings of this process's environment.

    Raises:
        ValueError: a variable with our prefix that is no setting, or a bad value.
    """
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    unknown = {name for name in os.environ if name.startswith(ENV_PREFIX)} - known
    if unknown:
        raise ValueError(
            f"unknown settings in the environment: {', '.join(sorted(unknown))}; "
            f"known: {', '.join(sorted(known))}"
        )
    return Settings()
