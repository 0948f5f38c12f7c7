"""Corrections that people have sent: photos and their right dishes, until an operator has decided.

    DIR/<class>/ID.jpg                accepted: what `--custom_data_dir DIR` trains on
    DIR/.pending/<class>/ID.jpg       waiting for the operator, a dish of the model
    DIR/.pending/_new/<name>/ID.jpg   waiting, a dish that the model does not know
    DIR/.records/ID.json              one line about each of them

Training reads no hidden folders, so nothing reaches it that the operator has not accepted. The
record makes a correction exist: it is written last. ID is the photo's hash.
"""

import hashlib
import io
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from filelock import Timeout
from PIL import Image

from app.answers import Answer
from app.ml.class_names import normalize_class_name, why_no_folder
from app.ml.durable import file_lock, replace_file, sync_folder, write_durably
from app.ml.preprocessing import load_image
from app.settings import Settings

PENDING, NEW, RECORDS, LOCK = ".pending", "_new", ".records", ".lock"
MAX_SIDE = 1024  # pixels of a stored photo
JPEG_QUALITY = 90
MAX_TOKENS = 8  # of one photo: whoever sends it again gets another
LOCK_SECONDS = 10.0
MAX_CLIENTS = 10_000  # whose rate is remembered

State = Literal["pending", "accepted"]
logger = logging.getLogger(__name__)


class DishNameError(ValueError):
    """A dish that cannot be called so; the message says why."""


class TooManyCorrectionsError(RuntimeError):
    """One client sends corrections faster than it may."""


class FeedbackFullError(RuntimeError):
    """As many corrections wait for the operator as may."""


class FeedbackStorageError(RuntimeError):
    """The folder cannot be written or read: a full disk, no permission."""


@dataclass(frozen=True)
class Correction:
    """What is stored beside a photo; nothing of the person who sent it.

    class_name: the right dish. is_new: the model did not know it. answer: None where the sender
    named none. tokens: SHA-256 of each token that deletes it.
    """

    id: str
    time: str
    state: State
    class_name: str
    is_new: bool
    answer: Answer | None
    tokens: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Correction":
        """Rebuild.

        Raises:
            ValueError, TypeError: not a record of ours.
        """
        values = json.loads(text)
        answer = values.pop("answer", None)
        tokens = tuple(values.pop("tokens", ()))
        return cls(**values, answer=answer and Answer(**answer), tokens=tokens)


def class_name_of(dish: str) -> str:
    """Return the class that a person's words name, as training would name it.

    Raises:
        DishNameError: it could not be the name of a folder.
    """
    name = normalize_class_name(dish)
    if reason := why_no_folder(name):
        raise DishNameError(f"{dish[:100]!r} cannot be the name of a dish: {reason}")
    return name


def stored_form(photo: bytes) -> bytes:
    """Encode a photo anew: upright, at most MAX_SIDE pixels, none of its metadata.

    Raises:
        ImageError: it cannot be used.
    """
    image = load_image(photo)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    clean = Image.frombytes("RGB", image.size, image.tobytes())  # without `info`
    clean.save(buffer := io.BytesIO(), "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def hash_of(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", errors="replace")).hexdigest()


class FeedbackStore:
    """The folder of corrections; every method may be called from any thread, and blocks."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.max_photos = settings.feedback_max_photos
        self.max_bytes = settings.feedback_max_bytes

    # Sending and taking back --------------------------------------------------------------------

    def add(
        self, photo: bytes, class_name: str, *, is_new: bool, answer: Answer | None
    ) -> tuple[Correction, str, bool]:
        """Store a photo and its right dish; return the record, a token, and whether it is new here.

        photo: in its `stored_form`. The same photo again is kept once: what waits takes the new
        name, what was accepted stays as it is, and the new token deletes it too.

        Raises:
            FeedbackFullError, FeedbackStorageError.
        """
        id, token = hashlib.sha256(photo).hexdigest()[:32], secrets.token_urlsafe(24)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = Correction(id, now, "pending", class_name, is_new, answer, (hash_of(token),))
        with self._locked():
            known = self._read(id)
            if known and self._find(known):  # an operator may have removed the file by hand
                tokens = (*known.tokens, hash_of(token))[-MAX_TOKENS:]
                kept = known if known.state == "accepted" else record
                record = replace(kept, tokens=tokens)
                self._move(record)
                return record, token, False
            self._check_room(len(photo))
            self._write_photo(record, photo)
        return record, token, True

    def _check_room(self, num_bytes: int) -> None:
        sizes = [path.stat().st_size for path in (self.folder / PENDING).rglob("*.jpg")]
        if len(sizes) >= self.max_photos or sum(sizes) + num_bytes > self.max_bytes:
            raise FeedbackFullError(
                f"{len(sizes):,} corrections wait to be reviewed, and there is no room for more; "
                "try again another day"
            )

    def _write_photo(self, record: Correction, photo: bytes) -> None:
        path = self._place(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_durably(path, photo)
            self._write(record)
        except OSError:
            self._erase(record.id)
            raise

    def delete(self, id: str, token: str) -> bool | None:
        """Delete what was sent with this token; None if there is no such photo, False if the token
        is not its own.

        Raises:
            FeedbackStorageError.
        """
        with self._locked():
            record = self._read(id)
            if record is None:
                return None
            given = hash_of(token)
            if not any(secrets.compare_digest(given, known) for known in record.tokens):
                return False
            self._erase(id)
        return True

    # Reviewing ----------------------------------------------------------------------------------

    def corrections(self, state: State) -> list[Correction]:
        """List those in a state, the oldest first.

        Raises:
            FeedbackStorageError.
        """
        with self._failures_explained():
            records = [record for record in self._all() if record.state == state]
        return sorted(records, key=lambda record: (record.time, record.id))

    def photo(self, id: str) -> bytes | None:
        """Read a photo; None if there is none.

        Raises:
            FeedbackStorageError.
        """
        with self._failures_explained():
            record = self._read(id)
            place = record and self._find(record)
            return place.read_bytes() if place else None

    def accept(self, id: str, class_name: str | None) -> Correction | None:
        """Let training have a photo, under another name if one is given; None if there is none.

        Raises:
            FeedbackStorageError.
        """
        with self._locked():
            if (record := self._read(id)) is None:
                return None
            accepted = replace(record, state="accepted", class_name=class_name or record.class_name)
            self._move(accepted)
        return accepted

    def discard(self, id: str) -> Correction | None:
        """Delete a photo and its record, which is returned; None if there is none.

        Raises:
            FeedbackStorageError.
        """
        with self._locked():
            if record := self._read(id):
                self._erase(id)
        return record

    # The folder ---------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Finish what an interrupted process left: moves, and photos that no record names.

        Nothing is removed from the folders of accepted photos, which may hold the operator's own.

        Raises:
            FeedbackStorageError.
        """
        with self._locked():
            for record in self._all():
                self._move(record)
            for path in [*(self.folder / PENDING).rglob("*"), *(self.folder / RECORDS).glob(".*")]:
                if path.is_file() and not self._record_path(path.stem).exists():
                    path.unlink()

    def num_accepted(self, class_name: str) -> int:
        """Count the photos that training would find for a dish."""
        with self._failures_explained():
            return sum(1 for _ in (self.folder / class_name).glob("*.jpg"))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other threads and processes from the folder, which is made if it is missing."""
        with self._failures_explained():
            (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
            with file_lock(self.folder / LOCK, timeout=LOCK_SECONDS):
                yield

    @contextmanager
    def _failures_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("the folder of corrections cannot be used: %s", error)
            taken = isinstance(error, Timeout)
            reason = "another process has it" if taken else error.strerror or "no permission"
            raise FeedbackStorageError(
                f"the server cannot store corrections at the moment ({reason})"
            ) from error

    def _all(self) -> list[Correction]:
        ids = [path.stem for path in (self.folder / RECORDS).glob("*.json")]
        return [record for id in ids if (record := self._read(id))]

    def _record_path(self, id: str) -> Path:
        return self.folder / RECORDS / f"{id}.json"

    def _place(self, record: Correction) -> Path:
        folder = self.folder
        if record.state == "pending":
            folder = folder / PENDING / NEW if record.is_new else folder / PENDING
        return folder / record.class_name / f"{record.id}.jpg"

    def _find(self, record: Correction) -> Path | None:
        """Return where the photo is: not in its place, where a move was interrupted."""
        place = self._place(record)
        return place if place.exists() else next(self.folder.rglob(place.name), None)

    def _read(self, id: str) -> Correction | None:
        path = self._record_path(id)
        try:
            return Correction.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            logger.warning("skipped: %s is not the record of a correction (%s)", path, error)
            return None

    def _write(self, record: Correction) -> None:
        write_durably(self._record_path(record.id), record.to_json().encode())

    def _move(self, record: Correction) -> None:
        """Write a record that has changed, and put the photo where it belongs now."""
        before, after = self._find(record), self._place(record)
        if record != self._read(record.id):
            self._write(record)
        if before and before != after:
            after.parent.mkdir(parents=True, exist_ok=True)
            replace_file(before, after)
            sync_folder(after.parent)
            self._remove_if_empty(before.parent)

    def _erase(self, id: str) -> None:
        """Delete all that is stored under an id, wherever an interrupted move has left it."""
        for photo in list(self.folder.rglob(f"{id}.jpg")):
            photo.unlink(missing_ok=True)
            self._remove_if_empty(photo.parent)
        self._record_path(id).unlink(missing_ok=True)
        sync_folder(self.folder / RECORDS)

    def _remove_if_empty(self, folder: Path) -> None:
        if folder != self.folder:
            with suppress(OSError):
                folder.rmdir()


class RateLimit:
    """How often each client may send, with as much at once as in a minute."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()  # allowance, since

    def check(self, client: str) -> None:
        """Count one more.

        Raises:
            TooManyCorrectionsError: it comes too soon.
        """
        now = time.monotonic()
        allowance, since = self._clients.pop(client, (float(self.per_minute), now))
        allowance = min(self.per_minute, allowance + (now - since) * self.per_minute / 60)
        self._clients[client] = (max(0.0, allowance - 1) if allowance >= 1 else allowance, now)
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)
        if allowance < 1:
            raise TooManyCorrectionsError(
                f"more than {self.per_minute} corrections a minute from one client; wait a minute"
            )
