"""Each picture decoded once: a small JPEG copy, upright RGB, is kept and read ever after.

An entry is a JPEG of at most `SHORT_SIDE` pixels on its short side, followed by the CRC-32 of
those bytes. Entries are written under a temporary name and renamed, so that any number of
processes and runs share a folder; a damaged entry is made anew; the folder may be deleted at any
time. What is read from the cache and what is made for it are the same bytes, so whether an image
was cached never shows in its pixels.
"""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from app.ml.preprocessing import load_image

SHORT_SIDE = 256
JPEG_QUALITY = 90
RESERVED_BYTES = 1 << 30  # the cache stops growing when less than this is free on its disk
CRC_BYTES = 4
FORMAT = f"nutrilearn-cache-1 {SHORT_SIDE} {JPEG_QUALITY}"

logger = logging.getLogger(__name__)


class ImageCache:
    """Reads pictures through a folder of small copies; without a folder, makes them each time."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, path: str) -> Tensor:
        """The small upright copy of a picture: uint8 (3, H, W).

        Raises:
            ImageError, OSError: the picture cannot be read.
        """
        if self.folder is None:
            return _decode(_make_entry(path))
        entry = self._entry_path(path)
        data = _read_entry(entry)
        if data is None:
            data = _make_entry(path)
            self._write_entry(entry, data)
        return _decode(data)

    def _entry_path(self, path: str) -> Path:
        """Named by the source's path, size and time, so a changed source is another entry."""
        assert self.folder is not None
        stat = Path(path).stat()
        source = f"{FORMAT} {Path(path).absolute()} {stat.st_size} {stat.st_mtime_ns}"
        name = hashlib.blake2b(source.encode("utf-8", "surrogateescape"), digest_size=16)
        return self.folder / name.hexdigest()[:2] / f"{name.hexdigest()[2:]}.jpg"

    def _write_entry(self, entry: Path, data: bytes) -> None:
        """Keep an entry if there is room; otherwise say so once and go on without."""
        temporary = entry.with_suffix(f".{os.getpid()}.tmp")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(entry.parent).free < RESERVED_BYTES:
                raise OSError(f"less than {RESERVED_BYTES >> 20} MB are free on the disk")
            temporary.write_bytes(data + zlib.crc32(data).to_bytes(CRC_BYTES, "big"))
            os.replace(temporary, entry)
        except OSError as error:
            logger.warning(
                "no more images are added to the cache in %s (%s); training goes on, slower",
                self.folder,
                error,
            )
            self.folder = None
            with contextlib.suppress(OSError):  # where the folder cannot be made, there is no file
                temporary.unlink(missing_ok=True)


def _read_entry(entry: Path) -> bytes | None:
    """The entry's JPEG bytes, or None where there is none or it is damaged."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    data, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
    return data if data and zlib.crc32(data).to_bytes(CRC_BYTES, "big") == crc else None


def _make_entry(path: str) -> bytes:
    image = load_image(path)
    scale = SHORT_SIDE / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _decode(data: bytes) -> Tensor:
    array = np.frombuffer(data, dtype=np.uint8).copy()  # torch wants memory it may write to
    with warnings.catch_warnings():
        # torchvision 0.29 calls it deprecated; Pillow gives the same pixels in 1.6 times the time.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return decode_jpeg(torch.from_numpy(array), mode=ImageReadMode.RGB)
