"""The files of a released model: their names, their schema, how they are saved, checked and read.

Version N is `food_model_vN.pth` (the plain state_dict), `food_model_vN.onnx` (the same network for
onnxruntime), `food_model_vN.centroids.pth` (what each class looks like to the head, to tell dishes
from other things), `food_model_vN.json` (its record, written once) and the folder `food_model_vN`
(its report). `food_model_vN.int8.onnx` is the network in 8-bit integers, where that is as good; its
answers are its own, and so are `food_model_vN.int8.centroids.pth`. `class_to_idx.json` and
`model_config.json` repeat the record of the current version. A version exists if and only if its
record does, which is the last of its files to appear.
"""

import hashlib
import io
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.ml.durable import file_lock, replace_file, sync_folder, write_durably
from app.ml.forms import FORM_SUFFIXES
from app.ml.model import is_backbone_name
from app.ml.preprocessing import PreprocessConfig

FORMAT_VERSION = 1
CLASS_MAP_NAME = "class_to_idx.json"
CONFIG_NAME = "model_config.json"
LOCK_NAME = ".release.lock"
STAGING = ".staging-"  # + a random name: a version in the making
PUBLISHING = ".publishing-v"  # + N: the files of version N are being put in place
# Suffixes of a version's files; see `FORM_SUFFIXES`.
WEIGHTS, ONNX, CENTROIDS = FORM_SUFFIXES["torch"], FORM_SUFFIXES["onnx"], ".centroids.pth"

logger = logging.getLogger(__name__)


class ArtifactError(RuntimeError):
    """A released model that cannot be saved or used; the message says why and what to do."""


class NoModelError(ArtifactError):
    """The folder holds no released model, or not the version or the form asked for."""


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
class OwnAnswers:
    """What was fitted and measured on the answers of one form, which are its own.

    metrics: those of the record that differ.
    """

    decision: Decision
    metrics: dict[str, Any]


@dataclass(frozen=True)
class ModelRecord:
    """Everything about one version but its weights; written to disk as JSON.

    decision, metrics: of the plain network, in each form that reproduces its logits.
    sha256: file name -> checksum of the version's .pth, .onnx, .centroids.pth and so on.
    metrics, training, libraries: for people and tools; no answer depends on them.
    forms: runtime -> what is different for the form that it reads. Not in the JSON if empty.
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
    forms: dict[str, OwnAnswers] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Return the class names in the order of the logits."""
        return sorted(self.class_to_idx, key=self.class_to_idx.__getitem__)

    def decision_of(self, runtime: str) -> Decision:
        """Return how the logits that this runtime computes become an answer."""
        return self.forms[runtime].decision if runtime in self.forms else self.decision

    def metrics_of(self, runtime: str) -> dict[str, Any]:
        """Return the metrics of the form that this runtime reads."""
        own = self.forms[runtime].metrics if runtime in self.forms else {}
        return {**self.metrics, **own}

    def to_json(self) -> str:
        values = {**asdict(self), "preprocessing": self.preprocessing.to_dict()}
        if not self.forms:
            del values["forms"]
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
        values = {"forms": {}, **values}
        known = {item.name for item in fields(cls)}
        if wrong := known ^ values.keys():
            raise ValueError(f"missing or unknown keys: {', '.join(sorted(wrong))}")
        values["preprocessing"] = PreprocessConfig.from_dict(values["preprocessing"])
        values["decision"] = Decision(**values["decision"])
        values["forms"] = {runtime: _own_answers(**own) for runtime, own in values["forms"].items()}
        record = cls(**values)
        if not is_backbone_name(record.model_name):
            raise ValueError(f"unknown backbone {record.model_name!r}")
        if sorted(record.class_to_idx.values()) != list(range(len(record.class_to_idx))):
            raise ValueError("class_to_idx does not number the classes 0 to n-1")
        return record


def _own_answers(decision: dict[str, Any], metrics: dict[str, Any]) -> OwnAnswers:
    return OwnAnswers(Decision(**decision), metrics)


def file_name(version: int, suffix: str) -> str:
    return f"food_model_v{version}{suffix}"


def weights_name(version: int) -> str:
    return file_name(version, WEIGHTS)


def onnx_name(version: int) -> str:
    return file_name(version, ONNX)


def centroids_name(version: int, runtime: str = "") -> str:
    """Name the centroids of the plain network, or those of a form that has its own."""
    return file_name(version, f".{runtime}{CENTROIDS}" if runtime else CENTROIDS)


def record_name(version: int) -> str:
    return file_name(version, ".json")


def report_folder_name(version: int) -> str:
    return file_name(version, "")


# Reading --------------------------------------------------------------------------------------


def list_versions(model_dir: Path) -> list[int]:
    """List the complete versions in a folder, oldest first."""
    found = (re.fullmatch(r"food_model_v(\d+)\.json", p.name) for p in model_dir.glob("*.json"))
    return sorted(int(match[1]) for match in found if match)


def read_record(model_dir: Path, version: int | None = None) -> ModelRecord:
    """Read the record of a version, or of the current one.

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


def current_version(model_dir: Path) -> int | None:
    """Return the number of the current version; None where there is none, or it is damaged."""
    try:
        return read_record(model_dir).version
    except (NoModelError, DamagedArtifactError):
        return None


def _read_current(model_dir: Path) -> ModelRecord:
    """Wait out the moment in which a release has replaced one file of two, and read the record."""
    for _ in range(20):
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
    """Read one of the record's files, which must have the recorded SHA-256.

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
    """Read the version's state_dict, on the CPU."""
    data = read_checked(model_dir, weights_name(record.version), record)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def read_centroids(model_dir: Path, record: ModelRecord, runtime: str = "torch") -> Tensor:
    """Read a form's class centroids, unit vectors: (num_classes, num_features)."""
    name = centroids_name(record.version, runtime if runtime in record.forms else "")
    data = read_checked(model_dir, name, record)
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


# Saving ---------------------------------------------------------------------------------------


def state_bytes(state: object) -> memoryview:
    """Serialize as torch.save does; the same tensors give the same bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


@dataclass
class NewVersion:
    """A version in the making, in a staging folder; see `new_version`.

    sha256: file name -> checksum of what was written so far.
    """

    number: int
    folder: Path
    sha256: dict[str, str] = field(default_factory=dict)
    record: ModelRecord | None = None
    becomes_current: bool = True

    @property
    def report_folder(self) -> Path:
        return self.folder / report_folder_name(self.number)

    def write(self, suffix: str, data: bytes | memoryview) -> None:
        """Write one of the version's files, which its record will name with its checksum."""
        name = file_name(self.number, suffix)
        write_durably(self.folder / name, data)
        self.sha256[name] = hashlib.sha256(data).hexdigest()

    def remove(self, suffix: str) -> None:
        """Remove one of the version's files again, if it was written."""
        name = file_name(self.number, suffix)
        self.sha256.pop(name, None)
        (self.folder / name).unlink(missing_ok=True)

    def write_record(self, record: ModelRecord) -> None:
        """Write the record; from now on the version can be loaded from the staging folder."""
        write_durably(self.folder / record_name(self.number), _encoded(record.to_json()))
        self.record = record


@contextmanager
def new_version(output_dir: Path) -> Iterator[NewVersion]:
    """Make the next version; left whole it is published beside the others, else nothing is.

    Inside, write every file, then the record, fill the report folder, and check the version as
    it lies in its folder. It becomes the current one unless `becomes_current` is set to False.

    Raises:
        SaveError: anything went wrong; the folder is as it was, and the cause is chained.
    """
    with _release_lock(output_dir):
        remove_leftovers(output_dir)
        try:
            staging = Path(tempfile.mkdtemp(dir=output_dir, prefix=STAGING))
            version = NewVersion(_next_number(output_dir), staging)
            version.report_folder.mkdir()
            yield version
            _publish(version, output_dir)
        finally:
            remove_leftovers(output_dir)


@contextmanager
def _release_lock(output_dir: Path) -> Iterator[None]:
    """Let one process at a time write to a folder, which is made if missing; explain failures."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with file_lock(output_dir / LOCK_NAME):
            yield
    except (OSError, RuntimeError, ValueError, ImportError, MemoryError) as error:
        raise SaveError(
            f"the model could not be saved in {output_dir}: {reason_of(error)}; "
            "earlier versions are untouched"
        ) from error


def reason_of(error: Exception) -> str:
    """Say what went wrong, in one line."""
    if isinstance(error, MemoryError):
        return "out of memory"
    return " ".join(str(error).split()) or type(error).__name__


def _next_number(output_dir: Path) -> int:
    """Count on from the files here, whether their version has a record or not."""
    found = (re.match(r"food_model_v(\d+)", path.name) for path in output_dir.iterdir())
    return 1 + max((int(match[1]) for match in found if match), default=0)


def _publish(version: NewVersion, output_dir: Path) -> None:
    """Move a version into its place: its files, then its record, then what names the current one.

    The record makes the version exist, so a crash before it leaves none, and one after it leaves a
    version that can be loaded.
    """
    record = version.record
    assert record, "a version needs its record"
    current = _current_files(record) if version.becomes_current else {}
    for name, data in current.items():
        write_durably(version.folder / name, data)
    (output_dir / f"{PUBLISHING}{version.number}").touch()
    for name in (*version.sha256, report_folder_name(version.number)):
        replace_file(version.folder / name, output_dir / name)
    sync_folder(output_dir)
    with _restored_on_failure(output_dir, [record_name(version.number), *current]):
        for name in (record_name(version.number), *current):
            replace_file(version.folder / name, output_dir / name)
            sync_folder(output_dir)


@contextmanager
def _restored_on_failure(folder: Path, names: list[str]) -> Iterator[None]:
    before = {folder / name: _content(folder / name) for name in names}
    try:
        yield
    except BaseException:
        for path, data in before.items():
            if data is None:
                path.unlink(missing_ok=True)
            elif _content(path) != data:
                write_durably(path, data)
        raise


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _current_files(record: ModelRecord) -> dict[str, bytes]:
    class_map = json.dumps(record.class_to_idx, indent=2, ensure_ascii=False) + "\n"
    return {CLASS_MAP_NAME: _encoded(class_map), CONFIG_NAME: _encoded(record.to_json())}


def _encoded(text: str) -> bytes:
    """Encode JSON; a path may hold bytes that are not text, which JSON can only hold escaped."""
    return text.encode("utf-8", errors="backslashreplace")


def remove_leftovers(output_dir: Path) -> None:
    """Remove what an interrupted release left; only under the release lock.

    Files of a version are removed only where a release marked its number as its own: weights
    without a record may be somebody's.
    """
    for path in output_dir.iterdir():
        if path.name.startswith((STAGING, f".{CLASS_MAP_NAME}.", f".{CONFIG_NAME}.")):
            _remove(path)
        elif match := re.fullmatch(rf"{re.escape(PUBLISHING)}(\d+)", path.name):
            if (number := int(match[1])) not in list_versions(output_dir):
                for part in output_dir.glob(f"food_model_v{number}.*"):
                    _remove(part)
                _remove(output_dir / report_folder_name(number))
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or folder if that is possible: another user's does no harm."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("cannot remove what an interrupted release left: %s", error)


def released_files(output_dir: Path, record: ModelRecord) -> list[Path]:
    """List every file of a version, and those that name it as the current one, if it is."""
    version = record.version
    is_current = _content(output_dir / CONFIG_NAME) == _content(output_dir / record_name(version))
    current = [CLASS_MAP_NAME, CONFIG_NAME] if is_current else []
    names = [*record.sha256, record_name(version), *current]
    report = output_dir / report_folder_name(version)
    return [output_dir / name for name in names] + sorted(report.iterdir())


def make_current(output_dir: Path, record: ModelRecord) -> None:
    """Make a released version the current one, and tidy up what an interrupted release left.

    Raises:
        SaveError: the files cannot be written.
    """
    files = _current_files(record)
    with _release_lock(output_dir):
        remove_leftovers(output_dir)
        with _restored_on_failure(output_dir, list(files)):
            for name, data in files.items():
                write_durably(output_dir / name, data)
