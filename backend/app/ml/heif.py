"""What the boxes of an AVIF or HEIC say about it (ISO/IEC 14496-12 and 23008-12)."""

import io
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from app.ml.containers import Container, ImageTooLargeError, UnreadableImageError, run_at_end

MAX_BOXES = 5_000  # 200 megapixels in tiles of 512x512 are 768 items
AVIF_BRANDS = {b"avif", b"avis"}
HEVC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
HEIF_BRANDS = AVIF_BRANDS | HEVC_BRANDS | {b"mif1", b"msf1"}
CODED_ITEMS = {b"av01", b"hvc1"}
# Boxes that hold boxes, and how many bytes stand before those.
PARENTS = {b"meta": 4, b"iprp": 0, b"ipco": 0} | dict.fromkeys(
    (b"moov", b"trak", b"mdia", b"minf", b"stbl"), 0
)
# Lists whose entries the decoder compares with each other, and how long they may be, in bytes.
LISTS = {b"iloc", b"iref", b"ipma", b"grpl", b"stts", b"ctts", b"stsc", b"stsz", b"stco", b"co64"}
MAX_LIST = 1 << 15
MAX_FRAMES = 100_000  # of an animation, each of which the decoder notes down before the first
# An entry of the list of items that is metadata.
METADATA_ITEM = re.compile(rb"(infe(?:\x02.{3}.{4}|\x03.{3}.{6}))(?:Exif|mime)", re.DOTALL)
AV1_CONFIG = re.compile(rb"av1C..(.)", re.DOTALL)
SEQUENCE_HEADER = 1


class _Place(NamedTuple):
    """Where an item's data stands in the file: its first piece, and its last one."""

    first: int
    last: int
    end: int


def brands(data: bytes) -> set[bytes]:
    """What a file of this family says it is; empty for other files."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12], *(data[place : place + 4] for place in range(16, end, 4))}


def read_heif(data: bytes) -> Container:
    """The file with its EXIF and XMP renamed, so that no decoder looks into them."""
    boxes = list(_boxes(data))
    coded = _coded_items(data, boxes)
    view = memoryview(data)
    if any(run_at_end(view[place.last : place.end]) for place in coded):
        raise UnreadableImageError("the image data is damaged: it ends in padding")
    if _frames(data, boxes) > MAX_FRAMES:
        raise ImageTooLargeError(f"the animation has more than {MAX_FRAMES:,} frames")
    clean = METADATA_ITEM.sub(rb"\1skip", data)
    if not brands(data) & AVIF_BRANDS:
        return Container("HEIF", clean)
    starts = {place.first for place in coded} | set(_track_starts(data, boxes))
    return Container(
        "AVIF",
        clean,
        coded_pixels=max((_av1_pixels(data, start) for start in starts), default=0),
        pixel_bytes=_av1_bytes(data),
    )


# Boxes ----------------------------------------------------------------------------------------

Box = tuple[bytes, int, int]


def _boxes(data: bytes) -> Iterator[Box]:
    """Name, start and end of the content of each box; those within parents one by one."""
    parts = [(0, len(data))]
    for _ in range(MAX_BOXES):
        while parts and parts[-1][0] + 8 > parts[-1][1]:
            parts.pop()
        if not parts:
            return
        start, end = parts.pop()
        length, name = struct.unpack_from(">I4s", data, start)
        content = start + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, content)
            content += 8
        stop = min(end, start + length) if length else end
        parts.append((max(stop, content), end))
        if name in PARENTS:
            parts.append((content + PARENTS[name], stop))
        elif name == b"iinf":
            parts.append((content + (8 if data[content] else 6), stop))
        elif name in LISTS and stop - content > MAX_LIST:
            break
        else:
            yield name, content, stop
    raise ImageTooLargeError(f"the image is made of more than {MAX_BOXES:,} parts")


def _coded_items(data: bytes, boxes: list[Box]) -> list[_Place]:
    """Where the coded pictures stand: the whole one, or its tiles, and what goes with them."""
    types: dict[int, bytes] = {}
    places: dict[int, _Place] = {}
    inline = next((start for name, start, _ in boxes if name == b"idat"), 0)
    for name, start, end in boxes:
        if name == b"infe":
            width = 4 if data[start] == 3 else 2
            item = int.from_bytes(data[start + 4 : start + 4 + width], "big")
            types[item] = data[start + width + 6 : start + width + 10]
        elif name == b"iloc":
            places.update(_places(io.BytesIO(data[start:end]), inline))
    return [place for item, place in places.items() if types.get(item) in CODED_ITEMS]


def _places(iloc: io.BytesIO, inline: int) -> Iterator[tuple[int, _Place]]:
    """Each item's number and place (ISO/IEC 14496-12, section 8.11.3)."""

    def number(size: int) -> int:
        return int.from_bytes(iloc.read(size), "big")

    version, sizes = number(4) >> 24, number(2)
    index_size = sizes & 15 if version else 0
    offset_end = index_size + (sizes >> 12)
    width = offset_end + (sizes >> 8 & 15)
    wide = 4 if version == 2 else 2
    for _ in range(min(number(wide), MAX_BOXES)):
        item = number(wide)
        method = number(2) & 15 if version else 0
        number(2)  # in which file: this one
        base = number(sizes >> 4 & 15) + (inline if method == 1 else 0)
        pieces = iloc.read(number(2) * width)
        if pieces and method < 2:
            first, last = pieces[:width], pieces[-width:]
            start = base + int.from_bytes(last[index_size:offset_end], "big")
            end = start + int.from_bytes(last[offset_end:], "big")
            yield (
                item,
                _Place(base + int.from_bytes(first[index_size:offset_end], "big"), start, end),
            )


def _frames(data: bytes, boxes: list[Box]) -> int:
    """How many frames the tracks have at most: all their chunks as large as the largest."""
    chunks = largest = 0
    for name, start, end in boxes:
        if name in (b"stco", b"co64"):
            chunks += int.from_bytes(data[start + 4 : start + 8], "big")
        elif name == b"stsc":
            entries = data[start + 8 : end]
            entries = entries[: len(entries) // 12 * 12]
            largest = max([largest, *(size for _, size, _ in struct.iter_unpack(">LLL", entries))])
    return chunks * largest


def _track_starts(data: bytes, boxes: list[Box]) -> Iterator[int]:
    """Where the first picture of each track of a sequence stands."""
    for name, start, _ in boxes:
        if name in (b"stco", b"co64"):
            yield int.from_bytes(data[start + 8 : start + (12 if name == b"stco" else 16)], "big")


# AV1 ------------------------------------------------------------------------------------------


def _av1_bytes(data: bytes) -> float:
    """Memory that decoding takes, a pixel, by depth and color resolution (AV1-ISOBMFF, 2.3.3).

    The planes twice, as film grain is put on a copy, one more plane for transparency, and 9 bytes
    for what is made of them.
    """
    worst = 0.0
    for config in AV1_CONFIG.findall(data):
        flags = config[0]
        sample = 2 if flags & 0x40 else 1
        colors = 0 if flags & 0x10 else 2 / (1 + (flags >> 3 & 1)) / (1 + (flags >> 2 & 1))
        worst = max(worst, 2.1 * (1 + colors) * sample + sample + 9)
    return worst


def _av1_pixels(data: bytes, start: int) -> int:
    """Pixels of the largest frame that the coded data announces (AV1 specification, section 5.5).

    The boxes may say less, and the decoder finds out only when it has decoded.
    """
    for _ in range(16):  # units that may come before the sequence header
        kind = data[start] >> 3 & 15
        sized = data[start] & 2
        start += 2 if data[start] & 4 else 1
        size, start = _leb128(data, start) if sized else (0, start)
        if kind == SEQUENCE_HEADER:
            return _sequence_pixels(_Bits(data[start : start + 512]))
        start += size
    raise UnreadableImageError("the image data is damaged: it does not say its size")


def _leb128(data: bytes, start: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where it ends."""
    value = 0
    for i in range(8):
        value |= (data[start + i] & 127) << 7 * i
        if data[start + i] < 128:
            return value, start + i + 1
    raise ValueError("a number of more than 8 bytes")


class _Bits:
    """Reads numbers of any width; zeros follow the end."""

    def __init__(self, data: bytes) -> None:
        self.rest = "".join(f"{byte:08b}" for byte in data)

    def take(self, count: int) -> int:
        taken, self.rest = self.rest[:count].ljust(count, "0"), self.rest[count:]
        return int(taken or "0", 2)


def _sequence_pixels(bits: _Bits) -> int:
    bits.take(4)  # profile, still picture
    if bits.take(1):  # reduced header
        bits.take(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    return (bits.take(width_bits) + 1) * (bits.take(height_bits) + 1)


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.take(1):  # timing
        bits.take(64)
        if bits.take(1):  # equal intervals, whose length is a number of as many bits as zeros
            zeros = len(bits.rest) - len(bits.rest.lstrip("0"))
            bits.take(2 * zeros + 1)
        if bits.take(1):  # decoder model
            delay_bits = bits.take(5) + 1
            bits.take(42)
    display_delay = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:  # level
            bits.take(1)
        if delay_bits and bits.take(1):
            bits.take(2 * delay_bits + 1)
        if display_delay and bits.take(1):
            bits.take(4)
