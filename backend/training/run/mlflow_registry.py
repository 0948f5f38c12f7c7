"""Released versions in MLflow's registry, and which one its aliases name.

`champion` is the version that is current in its folder, `challenger` the newest one that was
released there after it. Both follow from the folder, so setting them again changes nothing.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

REGISTERED_NAME = "nutrilearn-food"  # the model's name in MLflow's registry
CHAMPION, CHALLENGER = "champion", "challenger"
CONFIG_NAME = "model_config.json"  # repeats the record of the current version
VERSION_TAG, WEIGHTS_TAG = "food_model_version", "weights_sha256"


def read_facts(path: Path) -> dict[str, Any] | None:
    """Read the record of a version as plain JSON, without PyTorch; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and {"version", "sha256", "class_to_idx"} <= record.keys():
            return record
    return None


def register(
    client: Any, name: str, version: str, *, source: str, run_id: str, tags: dict[str, str]
) -> None:
    """Register a version, unless its run has done so."""
    known = client.search_model_versions(f"run_id = '{run_id}'")
    if any(v.name == name and v.tags.get(VERSION_TAG) == version for v in known):
        return
    create_once(client.create_registered_model, name)
    note = f"food_model_v{version}: takes pictures, gives dishes with their confidence."
    tags = {VERSION_TAG: version, **tags}
    client.create_model_version(name, source, run_id, tags, description=note)


def version_tags(record: dict[str, Any]) -> dict[str, str]:
    """Describe a version by what people filter by."""
    tags = {
        WEIGHTS_TAG: _weights(record),
        "model_name": record["model_name"],
        "num_classes": str(len(record["class_to_idx"])),
    }
    if (top1 := record["metrics"].get("test_top1")) is not None:
        tags["test_top1"] = f"{top1:.4f}"
    if parents := record.get("training", {}).get("parents"):  # a mean of versions
        tags["parents"] = ", ".join(f"v{version}" for version in parents)
    return tags


def set_aliases(client: Any, name: str, model_dir: Path) -> str:
    """Let the aliases follow the versions of a folder; say which version is the champion.

    An alias of a version that is not of this folder is left alone, unless a champion replaces it.
    """
    registered = client.search_model_versions(f"name = '{name}'")
    ours = {
        record["version"]: str(version.version)
        for record in _records(model_dir)
        for version in sorted(registered, key=lambda v: int(v.version))
        if _is_of(version, record)
    }
    current = (read_facts(model_dir / CONFIG_NAME) or {}).get("version")
    later = [ours[number] for number in sorted(ours) if current and number > current]
    wanted = {CHAMPION: ours.get(current), CHALLENGER: later[-1] if later else None}
    now = client.get_registered_model(name).aliases if registered else {}
    for alias, version in wanted.items():
        named = str(now.get(alias))
        if version and named != version:
            client.set_registered_model_alias(name, alias, version)
        elif not version and named in ours.values():
            client.delete_registered_model_alias(name, alias)
    if wanted[CHAMPION] is None:
        return f"v{current} is not in the registry, so that it has no alias"
    return f"{name} version {wanted[CHAMPION]} is the {CHAMPION}"


def _records(model_dir: Path) -> list[dict[str, Any]]:
    found = (read_facts(path) for path in model_dir.glob("food_model_v*.json"))
    return [record for record in found if record]


def _is_of(registered: Any, record: dict[str, Any]) -> bool:
    """Whether they are the same version; those registered before have no checksum."""
    is_number = registered.tags.get(VERSION_TAG) == str(record["version"])
    return is_number and registered.tags.get(WEIGHTS_TAG) in (None, _weights(record))


def _weights(record: dict[str, Any]) -> str:
    return str(record["sha256"][f"food_model_v{record['version']}.pth"])


def create_once(create: Callable[..., object], name: str, **options: object) -> None:
    """Create what may be there already: another run may have got there first."""
    from mlflow.exceptions import MlflowException

    try:
        create(name, **options)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
