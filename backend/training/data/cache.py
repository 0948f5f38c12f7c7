"""Small upright copies of the images, so that each is decoded at full size only once.

An entry is a JPEG of at most `short_side` pixels on its short side, followed by the CRC-32 of its
bytes. Entries are written under a temporary name and renamed, so any number of processes and runs
share a folder; a damaged entry is replaced; the folder may be deleted at any time. What is read
from the cache and what is written to it are the same bytes, so no pixel depends on the cache.
"""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import sys
import uuid
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from app.ml.preprocessing import DRAFT_SIDE, TRAINING_LIMITS, load_image

SHORT_SIDE, SERVED_CROP = 256, 260  # of the copies, and the largest training crop they are for
JPEG_QUALITY = 90
RESERVED_BYTES = 1 << 30  # the cache stops growing when less than this is free on its disk
CRC_BYTES = 4
SUFFIX = ".jpg+crc"

# torchvision 0.29 calls decoding deprecated, once per process, which is nothing that whoever trains
# could mend; Pillow gives the same pixels in 1.6 times the time. Not around each call, as threads
# share the filters.
warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning, "torchvision")

logger = logging.getLogger(__name__)


class ImageCache:
    """Reads images through a folder of small copies; without a folder, makes them each time.

    crop: the side of a training crop; the copies are larger where it is larger than usual.
    """

    def __init__(self, folder: Path | None, crop: int = 224) -> None:
        self.folder = folder
        self.short_side = SHORT_SIDE if crop <= SERVED_CROP else min(crop * 8 // 7, DRAFT_SIDE)
        self.is_growing = folder is not None

    def load(self, path: str) -> Tensor:
        """Return the small upright copy of an image: uint8 (3, H, W).

        Raises:
            ImageError, OSError: the image cannot be read.
        """
        if self.folder is None:
            return _decode(_make_entry(path, self.short_side))
        entry = self._entry_path(path)
        data = _read_entry(entry)
        if data is None:
            data = _make_entry(path, self.short_side)
            if self.is_growing:
                self._write_entry(entry, data)
        return _decode(data)

    def _entry_path(self, path: str) -> Path:
        """Name the entry after what tells that the image has changed.

        The time of the last change of the file's inode (on Windows: of its creation) is one of
        them: size and modification time may stay the same, where a file is replaced by a copy that
        keeps its times, or where a clock was set back.
        """
        assert self.folder is not None
        stat = os.stat(path)
        facts = (os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        kind = ("nutrilearn-cache-2", self.short_side, JPEG_QUALITY)
        source = " ".join(map(str, (*kind, *facts)))
        data = source.encode("utf-8", sys.getfilesystemencodeerrors())
        name = hashlib.blake2b(data, digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}{SUFFIX}"

    def _write_entry(self, entry: Path, data: bytes) -> None:
        """Keep an entry if there is room; otherwise say so once and add no more."""
        temporary = entry.with_name(f"{uuid.uuid4().hex}.tmp")
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(entry.parent).free < RESERVED_BYTES:
                raise OSError(f"less than {RESERVED_BYTES >> 20} MB are free on the disk")
            temporary.write_bytes(data + zlib.crc32(data).to_bytes(CRC_BYTES, "big"))
            os.replace(temporary, entry)
        except OSError as error:
            was_growing, self.is_growing = self.is_growing, False
            if was_growing:  # else another thread has said so
                logger.warning(
                    "no more images are added to the cache in %s (%s); continuing, slower",
                    self.folder,
                    error,
                )
            with contextlib.suppress(OSError):  # where the folder cannot be made, there is no file
                temporary.unlink(missing_ok=True)


def _read_entry(entry: Path) -> bytes | None:
    """Return the JPEG of an entry, or None where there is none or it is damaged."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    data, crc = content[:-CRC_BYTES], content[-CRC_BYTES:]
    return data if data and zlib.crc32(data).to_bytes(CRC_BYTES, "big") == crc else None


def _make_entry(path: str, short_side: int) -> bytes:
    image = load_image(path, TRAINING_LIMITS)
    scale = short_side / min(image.size)
    if scale < 1:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _decode(data: bytes) -> Tensor:
    array = np.frombuffer(data, dtype=np.uint8).copy()  # torch wants memory it may write to
    return decode_jpeg(torch.from_numpy(array), mode=ImageReadMode.RGB)
