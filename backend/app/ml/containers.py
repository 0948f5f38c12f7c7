"""What the bytes of a picture's file say about it, read before anything is decoded.

The reader of each container walks its chunks or boxes in a bounded number of steps. It gives the
decoder a file with the pixels' data and nothing else, as decoders parse, unpack and copy metadata
without a limit; of the metadata it keeps the orientation and the color profile. What checksums and
structure show to be damaged is refused here. The readers of JPEG, AVIF and HEIC have files of their
own.
"""

import contextlib
import hashlib
import itertools
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAX_CHUNKS = 50_000  # of a PNG or WebP; 20 MB in chunks of 8 kB are 2,500
MAX_GIF_BLOCKS = 100_000  # in front of the first frame: 25 MB of comments
MAX_PROFILE = 4 << 20  # bytes; the largest of print shops have 3 MB
MAX_XMP = 1 << 20
# So many equal bytes at the end of coded data come from a full disk or an unfinished copy.
PADDING = 64
LAST = 16  # of them, which a flat picture still needs, and one that is cut off never reaches
# Put in the place of such bytes: what is still wanted shows. One of them may happen to stand for
# the same pixels (one lossless WebP with a border in 2,000), hardly all of them.
FILLERS = tuple(hashlib.blake2b(bytes([n]), digest_size=LAST).digest() for n in range(4))


class ImageError(ValueError):
    """A picture that cannot be used; the message says why in words a user can act on."""


class UnreadableImageError(ImageError):
    """An image format we know, but the data is damaged, empty or of an unusable shape."""


class UnsupportedImageError(ImageError):
    """Not an image, or in a format that is not on the list."""


class ImageTooLargeError(ImageError):
    """More pixels, or more work for them, than we are willing to decode."""


@dataclass(frozen=True)
class Probe:
    """A change to a file that tells whether its data reaches the end of the picture.

    Bytes `start` to `stop` become one of `fillers`; `shows` says whether a whole picture looks
    different then. suspect: the file's structure alone hints that its data does not.
    """

    start: int
    stop: int
    fillers: tuple[bytes, ...]
    shows: bool
    suspect: bool = False


@dataclass(frozen=True)
class Container:
    """A picture's file as far as it can be understood without decoding.

    data: what the decoder gets, without metadata. orientation and profile (ICC): None where the
    decoder tells them. pixel_bytes: memory that decoding takes at its peak, a pixel. coded_pixels:
    those that an AVIF has coded, which may be more than it shows. coefficients: bytes in which a
    JPEG of several scans is held. work: blocks of 8x8 samples that its scans go through.
    clear_color: the PNG color that counts as transparent, in the file's own `depth` of bits.
    """

    format: str
    data: bytes
    orientation: int | None = None
    profile: bytes | None = None
    pixel_bytes: float = 8
    coded_pixels: int = 0
    coefficients: int = 0
    scans: int = 1
    work: int = 0
    clear_color: tuple[int, ...] | None = None
    depth: int = 8
    probe: Probe | None = None


# EXIF and XMP ---------------------------------------------------------------------------------

EXIF_PREFIX = re.compile(rb"(?:Exif\0\0)*")
ORIENTATION = 0x0112
INTEGERS = {3: "H", 4: "L", 8: "h", 9: "l"}  # TIFF's types of whole numbers
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')


def find_orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation in the metadata, 1 to 8; 1 where there is none or it is damaged."""
    orientation = _exif_orientation(exif)
    if orientation is None:
        match = XMP_ORIENTATION.search(xmp[:MAX_XMP])
        orientation = int(match[1]) if match else 1
    return orientation if 1 <= orientation <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    """Tag 0x0112 of the first directory (TIFF 6.0, section 2), and no other tag.

    Others may be huge, or broken in ways that do not matter here.
    """
    prefix = EXIF_PREFIX.match(exif)
    assert prefix  # matches nothing, too
    tiff = memoryview(exif)[prefix.end() :]
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}L", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
    except struct.error:
        return None
    entries = tiff[start + 2 : start + 2 + 12 * count]
    found = None
    for tag, kind, number, value in struct.iter_unpack(
        f"{order}HHL4s", entries[: len(entries) // 12 * 12]
    ):
        if tag == ORIENTATION and number == 1 and kind in INTEGERS:
            (found,) = struct.unpack_from(order + INTEGERS[kind], value)
    return found


# PNG ------------------------------------------------------------------------------------------

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
XMP = b"XML:com.adobe.xmp\0"
EXIF_AS_TEXT = b"Raw profile type exif\0"  # ImageMagick's way, older than the chunk for it


def read_png(data: bytes) -> Container:
    """The chunks of the picture alone, with its pixels in one; of an animation, its still."""
    if not data.startswith(PNG_MAGIC):
        raise UnreadableImageError("the image is cut off or damaged at its start")
    chunks, pixels, intact = _png_chunks(data)
    width, height, depth, color = struct.unpack_from(">IIBB", chunks.get(b"IHDR", b""))
    channels = CHANNELS.get(color, 1)
    if not intact:
        _check_stream(pixels, most=2 * height * (2 + width * channels * depth // 8))
    clear = chunks.get(b"tRNS", b"")
    by_color = bool(clear) and color in (GRAY, RGB)
    kept = (b"IHDR", b"PLTE") if by_color else (b"IHDR", b"PLTE", b"tRNS")
    parts = [_png_chunk(name, chunks[name]) for name in kept if name in chunks]
    parts += [_png_chunk(b"IDAT", *pixels), _png_chunk(b"IEND")]
    return Container(
        "PNG",
        b"".join([PNG_MAGIC, *itertools.chain(*parts)]),
        orientation=_png_orientation(chunks),
        profile=_inflate(bytes(chunks.get(b"iCCP", b"")).partition(b"\0")[2][1:], MAX_PROFILE),
        pixel_bytes=(16 if by_color else 12) if clear or color == GRAY_ALPHA else 8,
        clear_color=struct.unpack_from(f">{channels}H", clear) if by_color else None,
        depth=depth,
    )


def _png_chunks(data: bytes) -> tuple[dict[bytes, memoryview], list[memoryview], bool]:
    """The chunks by name (texts by keyword), the pixels' data in pieces, and whether it is intact.

    It is not where a checksum of it is wrong or no chunk follows it. A file that just ends too
    early counts as intact: the decoder knows whether it has all it needs.
    """
    chunks: dict[bytes, memoryview] = {}
    pixels: list[memoryview] = []
    intact = True
    view, position = memoryview(data), len(PNG_MAGIC)
    for _ in range(MAX_CHUNKS):
        name = data[position + 4 : position + 8]
        if name == b"IEND" or len(name) < 4:
            return chunks, pixels, intact
        if not name.isalpha():
            return chunks, pixels, False
        length = int.from_bytes(view[position : position + 4], "big")
        body = view[position + 8 : position + 8 + length]
        position += 12 + length
        if name == b"IDAT":
            pixels.append(body)
            crc = data[position - 4 : position]
            intact = intact and (
                _png_crc(name, body) == crc if len(crc) == 4 else not run_at_end(body)
            )
        elif name in TEXTS:
            chunks.update((key, body) for key in (XMP, EXIF_AS_TEXT) if body[: len(key)] == key)
        else:
            chunks.setdefault(name, body)
    raise ImageTooLargeError(f"the PNG has more than {MAX_CHUNKS:,} chunks")


def _png_crc(name: bytes, *pieces: bytes | memoryview) -> bytes:
    crc = zlib.crc32(name)
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc.to_bytes(4, "big")


def _png_chunk(name: bytes, *pieces: bytes | memoryview) -> list[bytes | memoryview]:
    length = sum(len(piece) for piece in pieces)
    return [length.to_bytes(4, "big"), name, *pieces, _png_crc(name, *pieces)]


def _check_stream(pieces: list[memoryview], most: int) -> None:
    """Refuse pixels' data that does not unpack to its own end, where its checksum stands."""
    stream, unpacked = zlib.decompressobj(), 0
    try:
        for piece in pieces:
            rest: bytes | memoryview = piece
            while rest and unpacked <= most:
                unpacked += len(stream.decompress(rest, 1 << 20))
                rest = stream.unconsumed_tail
    except zlib.error as error:
        raise UnreadableImageError(f"the image data is damaged: {error}") from error
    if not stream.eof:
        raise UnreadableImageError("the image data is damaged: it ends too early")


def _png_orientation(chunks: dict[bytes, memoryview]) -> int:
    exif = bytes(chunks.get(b"eXIf", b""))
    if not exif and EXIF_AS_TEXT in chunks:
        text = bytes(chunks[EXIF_AS_TEXT][len(EXIF_AS_TEXT) :])
        text = text if text[:1] != b"\0" else _inflate(text[1:], MAX_XMP) or b""
        with contextlib.suppress(ValueError):  # not in hexadecimal
            exif = bytes.fromhex("".join(text[:MAX_XMP].decode("latin-1").split("\n")[3:]))
    xmp = bytes(chunks.get(XMP, b""))[len(XMP) :]
    compressed, text = xmp[:1] == b"\1", xmp[2:].split(b"\0", 2)[-1]
    return find_orientation(exif, _inflate(text, MAX_XMP) or b"" if compressed else text)


def _inflate(data: bytes, limit: int) -> bytes | None:
    """The unpacked data; None where it is damaged, empty or longer than the limit."""
    stream = zlib.decompressobj()
    try:
        unpacked = stream.decompress(data, limit)
    except zlib.error:
        return None
    return unpacked if unpacked and not stream.unconsumed_tail else None


# GIF ------------------------------------------------------------------------------------------

GIF_BLOCK = re.compile(rb"[!,;]")
GRAPHIC_CONTROL = 0xF9


def read_gif(data: bytes) -> Container:
    """The first frame, with the screen grown to hold it, as the decoder would grow it."""
    colors = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    frame, control = _gif_frame(data, 13 + colors)
    screen = struct.unpack_from("<HH", data, 6)
    left, top, width, height = struct.unpack_from("<HHHH", data, frame + 1)
    size = max(screen[0], left + width), max(screen[1], top + height)
    if max(size) >= 1 << 16:
        raise UnreadableImageError("the image is damaged: its first frame lies outside of it")
    head = data[:6] + struct.pack("<HH", *size) + data[10 : 13 + colors]
    return Container(
        "GIF", b"".join([head, control, memoryview(data)[frame:]]), orientation=1, pixel_bytes=12
    )


def _gif_frame(data: bytes, position: int) -> tuple[int, bytes]:
    """Where the first frame begins, and the control block that belongs to it."""
    control, label, start = b"", 0, 0
    in_extension = False
    for _ in range(MAX_GIF_BLOCKS):
        if in_extension:
            size = data[position]
            position += 1 + size
            in_extension = size > 0
            if not in_extension and label == GRAPHIC_CONTROL:
                control = data[start:position]
        else:
            block = GIF_BLOCK.search(data, position)
            if block is None or block[0] == b";":
                raise UnreadableImageError("the image is cut off or damaged: it holds no frame")
            start = block.start()
            if block[0] == b",":
                return start, control
            label, position, in_extension = data[start + 1], start + 2, True
    raise ImageTooLargeError(f"the GIF has more than {MAX_GIF_BLOCKS:,} blocks before its pixels")


# WebP -----------------------------------------------------------------------------------------

WEBP_FRAMES = {b"VP8 ", b"VP8L", b"ANMF"}
WEBP_PARTS = {b"VP8X", b"ANIM", b"ALPH"} | WEBP_FRAMES


def read_webp(data: bytes) -> Container:
    """The chunks of the picture alone, of an animation those of its first frame."""
    parts: list[bytes | memoryview] = []
    metadata: dict[bytes, bytes] = {}
    names: set[bytes] = set()
    length, probe = 12, None
    for name, body in _webp_chunks(data):
        if name not in WEBP_PARTS:
            metadata[name] = bytes(body)
        elif name != b"ANMF" or name not in names:
            names.add(name)
            parts += [name, len(body).to_bytes(4, "little"), body, bytes(len(body) % 2)]
            length += 8 + len(body)
            if name in WEBP_FRAMES and run_at_end(body):
                probe = Probe(length - LAST, length, FILLERS, shows=True)
            length += len(body) % 2
    head = b"RIFF" + (length - 8).to_bytes(4, "little") + b"WEBP"
    return Container(
        "WEBP",
        b"".join([head, *parts]),
        orientation=find_orientation(metadata.get(b"EXIF", b""), metadata.get(b"XMP ", b"")),
        profile=metadata.get(b"ICCP"),
        pixel_bytes=16.5 if names <= {b"VP8X", b"VP8 "} else 18.5,
        probe=probe,
    )


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view, position = memoryview(data), 12
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    for _ in range(MAX_CHUNKS):
        if position + 8 > end:
            return
        name = data[position : position + 4]
        length = int.from_bytes(data[position + 4 : position + 8], "little")
        body = view[position + 8 : position + 8 + length]
        if len(body) < length and name in WEBP_PARTS:
            raise UnreadableImageError("the image data is damaged: the file ends too early")
        yield name, body
        position += 8 + length + length % 2
    raise ImageTooLargeError(f"the WebP has more than {MAX_CHUNKS:,} chunks")


def run_at_end(body: memoryview) -> int:
    """How many bytes at the end are the same, if they are too many for coded data; else 0."""
    last = bytes(body[-1:])
    if body[-PADDING:] != last * PADDING:
        return 0
    return len(body) - len(bytes(body).rstrip(last))
