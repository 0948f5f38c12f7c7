"""The files of a released model: their names, their schema, how they are saved, checked and read.

A version N is `food_model_vN.pth` (the plain state_dict), `food_model_vN.onnx` (the same network
for onnxruntime), `food_model_vN.centroids.pth` (what each class looks like to the head, to tell
dishes from other things), `food_model_vN.json` (its record, written once) and the folder
`food_model_vN` (its report). `class_to_idx.json` and `model_config.json` repeat the record of the
current version. A version exists exactly if its record does: it is the last of its files to appear.
"""

import hashlib
import io
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.ml.durable import check_writable, file_lock, replace_file, sync_folder, write_durably
from app.ml.model import BACKBONES
from app.ml.preprocessing import PreprocessConfig

FORMAT_VERSION = 1
CLASS_MAP_NAME = "class_to_idx.json"
CONFIG_NAME = "model_config.json"
LOCK_NAME = ".release.lock"
PUBLISHING = ".publishing-v"  # + N: the files of version N are being put in place


class ArtifactError(RuntimeError):
    """A released model that cannot be saved or used; the message says why and what to do."""


class NoModelError(ArtifactError):
    """The folder holds no released model, or not the version asked for."""


class DamagedArtifactError(ArtifactError):
    """A file is missing, unreadable, not what its checksum says, or does not fit the others."""


class SaveError(ArtifactError):
    """A version could not be saved; what was there before is untouched."""


@dataclass(frozen=True)
class Decision:
    """How logits become an answer; every number is fitted on the validation split.

    temperature: logits are divided by it before the softmax (Guo et al. 2017, arXiv:1706.04599).
    confident_at: lowest calibrated confidence that counts as "confident".
    food_at: lowest cosine similarity between what the head sees of an image and the nearest class
        centroid that counts as a dish the model knows.
    """

    temperature: float
    confident_at: float
    food_at: float


@dataclass(frozen=True)
class ModelRecord:
    """Everything about one version but its weights; written to disk as JSON.

    sha256: file name -> checksum of the version's .pth, .onnx and .centroids.pth.
    metrics, training, libraries: for people and tools; nothing is rebuilt from them.
    """

    format_version: int
    version: int
    model_name: str
    class_to_idx: dict[str, int]
    preprocessing: PreprocessConfig
    decision: Decision
    sha256: dict[str, str]
    metrics: dict[str, Any]
    training: dict[str, Any]
    libraries: dict[str, str]
    created: str

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the logits."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)

    def to_json(self) -> str:
        values = {**asdict(self), "preprocessing": self.preprocessing.to_dict()}
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelRecord":
        """Rebuild and check.

        Raises:
            ValueError: not JSON, an unknown or missing key, another format version, an unknown
                backbone, or classes that do not count 0 to n-1.
        """
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"format version {values.get('format_version')}; this code reads {FORMAT_VERSION}"
            )
        known = {field.name for field in fields(cls)}
        if wrong := known ^ values.keys():
            raise ValueError(f"missing or unknown keys: {', '.join(sorted(wrong))}")
        values["preprocessing"] = PreprocessConfig.from_dict(values["preprocessing"])
        values["decision"] = Decision(**values["decision"])
        record = cls(**values)
        if record.model_name not in BACKBONES:
            raise ValueError(f"unknown backbone {record.model_name!r}")
        if sorted(record.class_to_idx.values()) != list(range(len(record.class_to_idx))):
            raise ValueError("class_to_idx does not number the classes 0 to n-1")
        return record


def weights_name(version: int) -> str:
    return f"food_model_v{version}.pth"


def onnx_name(version: int) -> str:
    return f"food_model_v{version}.onnx"


def centroids_name(version: int) -> str:
    return f"food_model_v{version}.centroids.pth"


def record_name(version: int) -> str:
    return f"food_model_v{version}.json"


def report_folder_name(version: int) -> str:
    return f"food_model_v{version}"


# Reading --------------------------------------------------------------------------------------


def list_versions(model_dir: Path) -> list[int]:
    """The complete versions in a folder, oldest first."""
    found = (re.fullmatch(r"food_model_v(\d+)\.json", p.name) for p in model_dir.glob("*.json"))
    return sorted(int(match[1]) for match in found if match)


def read_record(model_dir: Path, version: int | None = None) -> ModelRecord:
    """The record of a version, or of the current one.

    Raises:
        NoModelError: nothing released there, or not that version.
        DamagedArtifactError: a file that cannot be read or does not agree with the others.
    """
    if version is not None:
        if version not in (known := list_versions(model_dir)):
            raise NoModelError(f"no version {version} in {model_dir}; there: {known or 'none'}")
        return _parse_record(model_dir / record_name(version))
    if not (model_dir / CONFIG_NAME).exists():
        raise NoModelError(
            f"no trained model in {model_dir}; train one: python backend/train_model.py --sample"
        )
    return _read_current(model_dir)


def _read_current(model_dir: Path, tries: int = 20) -> ModelRecord:
    """The current record; waits out the moment in which a release has replaced one file of two."""
    for _ in range(tries):
        record = _parse_record(model_dir / CONFIG_NAME)
        if record != _parse_record(own := model_dir / record_name(record.version)):
            raise DamagedArtifactError(
                f"{model_dir / CONFIG_NAME} differs from {own.name}, which it repeats; copy the "
                "one that is right over the other"
            )
        if _read_class_map(model_dir / CLASS_MAP_NAME) == record.class_to_idx:
            return record
        time.sleep(0.05)
    raise DamagedArtifactError(
        f"{CLASS_MAP_NAME} and {CONFIG_NAME} in {model_dir} name different classes; "
        f"copy the class_to_idx of {record_name(record.version)} back into {CLASS_MAP_NAME}"
    )


def _parse_record(path: Path) -> ModelRecord:
    try:
        return ModelRecord.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DamagedArtifactError(f"{path} cannot be used: {error}") from error


def _read_class_map(path: Path) -> dict[str, int]:
    try:
        class_map = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedArtifactError(f"{path} cannot be used: {error}") from error
    return class_map


def read_checked(model_dir: Path, name: str, record: ModelRecord) -> bytes:
    """The bytes of one of the record's files, which must have the recorded SHA-256.

    Raises:
        DamagedArtifactError: missing, unreadable or changed.
    """
    try:
        data = (model_dir / name).read_bytes()
    except OSError as error:
        raise DamagedArtifactError(f"{model_dir / name} cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != record.sha256.get(name):
        raise DamagedArtifactError(
            f"{model_dir / name} is damaged: its SHA-256 is not the one in "
            f"{record_name(record.version)}; restore the file or use another version"
        )
    return data


def read_state(model_dir: Path, record: ModelRecord) -> dict[str, Tensor]:
    """The version's state_dict, on the CPU."""
    data = read_checked(model_dir, weights_name(record.version), record)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def read_centroids(model_dir: Path, record: ModelRecord) -> Tensor:
    """The version's class centroids, unit vectors: (num_classes, num_features)."""
    data = read_checked(model_dir, centroids_name(record.version), record)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# Saving ---------------------------------------------------------------------------------------


def check_output_dir(output_dir: Path, flag: str = "--output_dir") -> None:
    """Prove, before hours of training, that a version can be saved in a folder.

    Raises:
        FolderError: one line that names the flag.
    """
    check_writable(output_dir, flag, LOCK_NAME)


def state_bytes(state: object) -> memoryview:
    """What torch.save writes for an object; the same tensors give the same bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def save_version(
    output_dir: Path,
    *,
    state: dict[str, Tensor],
    centroids: Tensor,
    onnx: bytes | None,
    make_record: Callable[[int, dict[str, str]], ModelRecord],
    write_report: Callable[[Path, ModelRecord], None],
    verify: Callable[[Path], None],
) -> ModelRecord:
    """Write the next version beside the old ones, verify it, and only then make it current.

    make_record: (version, sha256 by file name) -> record. write_report: fills the report folder.
    verify: gets a folder in which the new version is current, and raises if it does not do what
    was trained.

    Raises:
        SaveError: anything went wrong; the folder is as it was, and the cause is chained.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(output_dir / LOCK_NAME):
            remove_leftovers(output_dir)
            version = _next_version(output_dir)
            staging = Path(tempfile.mkdtemp(dir=output_dir, prefix=".staging-"))
            try:
                contents = _contents(version, state, centroids, onnx)
                record = _stage(staging, version, contents, make_record)
                (report := staging / report_folder_name(version)).mkdir()
                write_report(report, record)
                verify(staging)
                _publish(staging, output_dir, version)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
                remove_leftovers(output_dir)
    except (OSError, RuntimeError, ValueError) as error:
        raise SaveError(
            f"the model could not be saved in {output_dir}: {error}; the versions that were there "
            "are untouched"
        ) from error
    return record


def _contents(
    version: int, state: dict[str, Tensor], centroids: Tensor, onnx: bytes | None
) -> dict[str, memoryview]:
    contents = {
        weights_name(version): state_bytes(state),
        centroids_name(version): state_bytes(centroids),
    }
    return contents if onnx is None else {**contents, onnx_name(version): memoryview(onnx)}


def _stage(
    staging: Path,
    version: int,
    contents: dict[str, memoryview],
    make_record: Callable[[int, dict[str, str]], ModelRecord],
) -> ModelRecord:
    record = make_record(version, {n: hashlib.sha256(d).hexdigest() for n, d in contents.items()})
    contents |= {record_name(version): memoryview(record.to_json().encode())}
    contents |= _current_files(record)
    for name, data in contents.items():
        write_durably(staging / name, data)
    return record


def _current_files(record: ModelRecord) -> dict[str, memoryview]:
    class_map = json.dumps(record.class_to_idx, indent=2, ensure_ascii=False) + "\n"
    texts = {CLASS_MAP_NAME: class_map, CONFIG_NAME: record.to_json()}
    return {name: memoryview(text.encode()) for name, text in texts.items()}


def _publish(staging: Path, output_dir: Path, version: int) -> None:
    (output_dir / f"{PUBLISHING}{version}").touch()
    for name in (*_file_names(version), report_folder_name(version)):
        if (staging / name).exists():
            replace_file(staging / name, output_dir / name)
    sync_folder(output_dir)
    current = [output_dir / name for name in (CLASS_MAP_NAME, CONFIG_NAME)]
    before = {path: path.read_bytes() if path.exists() else None for path in current}
    try:
        for name in (record_name(version), CLASS_MAP_NAME, CONFIG_NAME):
            replace_file(staging / name, output_dir / name)
            sync_folder(output_dir)
    except BaseException:
        (output_dir / record_name(version)).unlink(missing_ok=True)
        for path, data in before.items():
            if data is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != data:
                write_durably(path, data)
        raise


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a release left that was cut off; only under the release lock.

    Files of a version are removed only where a release marked it as its own: weights without a
    record may be somebody's.
    """
    for path in output_dir.iterdir():
        if path.name.startswith((".staging-", f".{CLASS_MAP_NAME}.", f".{CONFIG_NAME}.")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for marker in output_dir.glob(f"{PUBLISHING}*"):
        version = int(marker.name.removeprefix(PUBLISHING))
        if version not in list_versions(output_dir):
            for path in (output_dir / name for name in _file_names(version)):
                path.unlink(missing_ok=True)
            shutil.rmtree(output_dir / report_folder_name(version), ignore_errors=True)
        marker.unlink()


def _file_names(version: int) -> tuple[str, str, str]:
    return weights_name(version), onnx_name(version), centroids_name(version)


def _next_version(output_dir: Path) -> int:
    """One more than any file here is named after, with a record or without."""
    found = (re.match(r"food_model_v(\d+)", path.name) for path in output_dir.iterdir())
    return 1 + max((int(match[1]) for match in found if match), default=0)


def make_current(output_dir: Path, record: ModelRecord) -> None:
    """Finish a release that was cut off when its version was complete: tidy up, and let the current
    files name it if it is the newest."""
    with file_lock(output_dir / LOCK_NAME):
        remove_leftovers(output_dir)
        if record.version == list_versions(output_dir)[-1]:
            for name, data in _current_files(record).items():
                write_durably(output_dir / name, data)
