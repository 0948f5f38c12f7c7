"""From a request to the bytes of its photo: in memory, and never more than is allowed.

A photo is the field `file` of a multipart form, with a file name or without, or the whole body
(`Content-Type: image/...`). Nothing is written to disk here.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.inference import OverloadedError
from app.logs import shorten
from app.metrics import Metrics

FIELD = "file"
FORM_TYPE = b"multipart/form-data"
MAX_PARTS = 1000
BLOCK = 2**16  # bytes; a body is kept in blocks of at least this, as one large one is copied often
MAX_TEXT = 1000  # bytes of a field that is not the photo
PARSING_SECONDS = 1.0  # a form of 20 MiB takes 0.03 s, one that was made to be slow 20 s


class MalformedFormError(ValueError):
    """A multipart body that cannot be parsed; the message says what is wrong with it."""


class NoPhotoError(ValueError):
    """A request without a photo; the message says where one is expected."""


class FieldError(ValueError):
    """A field of a form that is missing, or not what it should be."""


Body = list[bytes | bytearray]


class UploadMemory:
    """Holds the bodies of all uploads, from their arrival until they are answered."""

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self.max_bytes = max_bytes
        self.held = 0
        self.metrics = metrics

    @asynccontextmanager
    async def body_of(self, request: Request) -> AsyncIterator[Body]:
        """Read a request's body; it is gone when the context ends.

        Raises:
            OverloadedError: all bodies together would be larger than they may be.
        """
        body: Body = []
        size = 0
        try:
            async for piece in request.stream():
                if self.held + len(piece) > self.max_bytes:
                    raise OverloadedError("too many uploads are under way; try again in a moment")
                if len(piece) >= BLOCK:
                    body.append(piece)
                elif body and isinstance(body[-1], bytearray) and len(body[-1]) < BLOCK:
                    body[-1] += piece
                else:
                    body.append(bytearray(piece))
                size += len(piece)
                self._hold(len(piece))
            yield body
        finally:
            self._hold(-size)
            body.clear()  # a job that was dropped keeps it until its turn would have come

    def _hold(self, num_bytes: int) -> None:
        self.held += num_bytes
        self.metrics.upload_bytes.set(self.held)


def check_content_type(content_type: str) -> None:
    """Refuse, before the body is read, what cannot hold a photo.

    Raises:
        NoPhotoError: neither a form nor an image.
    """
    kind, _ = parse_options_header(content_type)
    if kind not in (FORM_TYPE, b"application/octet-stream") and not kind.startswith(b"image/"):
        raise NoPhotoError(
            f"send the photo as the field {FIELD!r} of a form (multipart/form-data), or as the "
            f"body with Content-Type: image/jpeg; this request's Content-Type is "
            f"{shorten(content_type, 100)!r}"
        )


def take_photo(body: Body, content_type: str) -> bytes:
    """Return the photo's bytes, and empty the body: two copies of a large photo are enough.

    Raises:
        MalformedFormError: a form that is cut off or broken.
        NoPhotoError: a form without the field `file`.
    """
    kind, _ = parse_options_header(content_type)
    if kind != FORM_TYPE:
        photo = b"".join(body)
        body.clear()
        return photo
    return take_form(body, content_type)[0]


def take_form(body: Body, content_type: str, *names: str) -> tuple[bytes, dict[str, str]]:
    """Return the photo of a form and its fields with these names, and empty the body.

    Raises:
        MalformedFormError: it is cut off or broken, or no form.
        NoPhotoError: it lacks the field `file`.
        FieldError: one of the fields is too long, or not text.
    """
    _, options = parse_options_header(content_type)
    try:
        form = _Form(options.get(b"boundary", b""), names)
        form.parse(body)
    except FormParserError as error:
        raise MalformedFormError(f"the form is not valid multipart: {error}") from error
    body.clear()
    return form.photo(), {name: _text(name, data) for name, data in form.texts.items()}


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise FieldError(f"the field {name!r} is not UTF-8 text") from error


class _Form:
    """A multipart form; kept are the names of the fields, the photo's bytes and some texts."""

    def __init__(self, boundary: bytes, wanted: tuple[str, ...]) -> None:
        if not boundary:
            raise MalformedFormError("the Content-Type names no boundary")
        self.wanted = wanted
        self.texts: dict[str, bytes] = {}
        self.names: list[str] = []
        self.pieces: list[bytes] = []  # of the photo; the last field with its name counts
        self.has_photo = False
        self.ended = False
        self.header = self.value = b""
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_begin": self._begin_header,
                "on_header_field": self._add_to_header,
                "on_header_value": self._add_to_value,
                "on_header_end": self._end_header,
                "on_part_data": self._add_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def parse(self, body: Body) -> None:
        began = time.thread_time()
        for block in body:
            self.parser.write(bytes(block))
            if time.thread_time() - began > PARSING_SECONDS:
                raise MalformedFormError("the form takes too long to parse")

    def photo(self) -> bytes:
        if self.has_photo:
            return b"".join(self.pieces)
        if not self.ended:
            raise MalformedFormError("the body ends before its last boundary")
        found = shorten(", ".join(map(repr, self.names)), 100) or "no field"
        raise NoPhotoError(f"no form field is named {FIELD!r}; the form has {found}")

    def _begin_part(self) -> None:
        self.names.append("")
        if len(self.names) > MAX_PARTS:
            raise MalformedFormError(f"the form has more than {MAX_PARTS} fields")

    def _begin_header(self) -> None:
        self.header = self.value = b""

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def _end_header(self) -> None:
        if self.header.lower() == b"content-disposition":
            _, options = parse_options_header(self.value)
            self.names[-1] = options.get(b"name", b"").decode(errors="replace")
            if self.names[-1] == FIELD:
                self.pieces, self.has_photo = [], False
            elif self.names[-1] in self.wanted:
                self.texts[self.names[-1]] = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        name = self.names[-1]
        if name == FIELD:
            self.pieces.append(data[start:end])
        elif name in self.texts:
            self.texts[name] += data[start:end]
            if len(self.texts[name]) > MAX_TEXT:
                raise FieldError(f"the field {name!r} is longer than {MAX_TEXT} bytes")

    def _end_part(self) -> None:
        if self.names[-1] == FIELD:
            self.has_photo = True

    def _end(self) -> None:
        self.ended = True
