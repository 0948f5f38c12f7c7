"""Pictures for tests, made byte by byte where no encoder would write them."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from app.ml.preprocessing import PreprocessConfig

MEGABYTE = 2**20
ORIENTATION = 0x0112


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The file that Pillow, or pillow-heif for HEIF, writes."""
    buffer = io.BytesIO()
    if form == "HEIF":
        import pillow_heif

        heif = pillow_heif.from_pillow(image)
        heif.info.update(exif=options.pop("exif", None))
        heif.save(buffer, **options)
    else:
        image.save(buffer, form, **options)
    return buffer.getvalue()


def resized_by_pillow(image: Image.Image, config: PreprocessConfig) -> Tensor:
    """What `EvalTransform` gives but for rounding, uint8 (3, crop, crop)."""
    mode = InterpolationMode(config.interpolation)
    resized = F.resize(image, [config.resize], interpolation=mode)
    return F.pil_to_tensor(F.center_crop(resized, [config.crop, config.crop]))


def plate(size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    return Image.radial_gradient("L").resize(size).convert(mode)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def photo_like(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blurred color with some grain: compresses as a photo does."""
    coarse = noise(max(1, width // 16), max(1, height // 16), seed=seed)
    fine = noise(width, height, seed=seed + 1)
    return Image.blend(coarse.resize((width, height), Image.Resampling.BICUBIC), fine, 0.08)


# EXIF -----------------------------------------------------------------------------------------

Tag = tuple[int, int, int, bytes]  # number, type, count, value


def exif(tags: list[Tag], order: str = "<") -> bytes:
    """An EXIF block of one directory; values that do not fit into it follow."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8)
    entries, values = struct.pack(f"{order}H", len(tags)), b""
    place = len(head) + 2 + 12 * len(tags) + 4
    for number, kind, count, value in tags:
        field = value.ljust(4, b"\0")
        if len(value) > 4:
            field = struct.pack(f"{order}L", place + len(values))
            values += value
        entries += struct.pack(f"{order}HHL", number, kind, count) + field
    return head + entries + b"\0" * 4 + values


def orientation_tag(value: int, order: str = "<") -> Tag:
    return ORIENTATION, 3, 1, struct.pack(f"{order}H", value)


def huge_exif(megabytes: int) -> bytes:
    """Turned by 90 degrees, and with a tag of so many megabytes of fractions."""
    count = megabytes * MEGABYTE // 8
    return exif([orientation_tag(6), (0x013E, 5, count, struct.pack("<LL", 1, 3) * count)])


# JPEG -----------------------------------------------------------------------------------------

Scan = tuple[list[int], tuple[int, int, int], bytes]  # components, first, last and bits, data


def segment(marker: int, payload: bytes = b"") -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def app1(payload: bytes, name: bytes = b"Exif\0\0") -> bytes:
    """Metadata of any length, cut into segments."""
    parts = [payload[i : i + 65_000] for i in range(0, len(payload), 65_000)]
    return b"".join(segment(0xE1, name + part) for part in parts)


def jpeg_with(inserted: bytes, image: Image.Image | None = None) -> bytes:
    """A JPEG with something at the start of its header."""
    jpeg = encoded(image or plate(), "JPEG")
    return jpeg[:2] + inserted + jpeg[2:]


def jpeg(
    size: tuple[int, int], components: int, frame: int, scans: list[Scan], first: int
) -> bytes:
    """A JPEG of given scans; in its tables one zero bit is a DC difference of 0, or `first`."""
    parts = [b"\xff\xd8", segment(0xDB, b"\0" + b"\x10" * 64)]
    if components == 4:
        parts.append(segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"))
    sampling = b"".join(bytes([i, 0x11, 0]) for i in range(components))
    parts.append(segment(frame, struct.pack(">BHHB", 8, *reversed(size), components) + sampling))
    counts = bytes([1] + [0] * 15)
    parts += [
        segment(0xC4, b"\0" + counts + b"\0"),
        segment(0xC4, b"\x10" + counts + bytes([first])),
    ]
    for numbers, spectrum, data in scans:
        of_each = b"".join(bytes([number, 0]) for number in numbers)
        parts += [segment(0xDA, bytes([len(numbers)]) + of_each + bytes(spectrum)), data]
    return b"".join([*parts, b"\xff\xd9"])


def flat_jpeg(size: tuple[int, int], components: int = 3, together: bool = True) -> bytes:
    """Gray, a quarter of a byte a block; baseline, the components in one scan or one each."""
    blocks = -(-size[0] // 8) * -(-size[1] // 8)
    groups = [list(range(components))] if together else [[i] for i in range(components)]
    scans = [(group, (0, 63, 0), bytes(-(-2 * blocks * len(group) // 8))) for group in groups]
    return jpeg(size, components, 0xC0, scans, first=0)


def scan_bomb(size: tuple[int, int], scans: int, refines: bool = False) -> bytes:
    """Progressive and gray; each scan but the first says "nothing here" once in 32,767 blocks."""
    blocks = -(-size[0] // 8) * -(-size[1] // 8)
    codes, left = "", blocks
    while left > 0:
        run = min(32_767, max(left, 16_384))
        codes += "0" + format(run - 16_384, "014b")
        left -= run
    codes += "1" * (-len(codes) % 8)
    nothing = int(codes, 2).to_bytes(len(codes) // 8, "big").replace(b"\xff", b"\xff\0")
    bits = (0x01, 0x10) if refines else (0, 0)
    first: Scan = ([0], (0, 0, bits[0]), bytes(-(-blocks // 8)))
    others: list[Scan] = [([0], (1, 63, bits[1]), nothing)] * (scans - 1)
    return jpeg(size, 1, 0xC2, [first, *others], first=0xE0)


# PNG ------------------------------------------------------------------------------------------

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def png_chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    size: tuple[int, int],
    depth: int,
    color: int,
    *extra: bytes,
    rows: int | None = None,
    data: bytes | None = None,
) -> bytes:
    """A PNG of these rows, or of so many rows of zeros; chunks go before the pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    row = 1 + (size[0] * depth * channels + 7) // 8
    if data is None:
        data = bytes(row * (size[1] if rows is None else rows))
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(data, 9))
    return b"".join([PNG_MAGIC, header, *extra, pixels, png_chunk(b"IEND")])


def png_with(*chunks: bytes) -> bytes:
    """A PNG with chunks in front of its pixels."""
    data = encoded(plate())
    place = data.index(b"IDAT") - 4
    return b"".join([data[:place], *chunks, data[place:]])


# GIF, WebP, AVIF and HEIC ---------------------------------------------------------------------


def gif_with(blocks: bytes) -> bytes:
    """A GIF with blocks in front of its frame."""
    data = encoded(plate(), "GIF")
    frame = 13 + (3 << (data[10] & 7) + 1)
    return data[:frame] + blocks + data[frame:]


def gif_of_screen(width: int, height: int) -> bytes:
    """A small frame on a screen of this size."""
    data = encoded(plate(), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def claiming(data: bytes, size: tuple[int, int], claimed: tuple[int, int]) -> bytes:
    """An AVIF or HEIC whose boxes say another size than its data has."""
    return data.replace(struct.pack(">II", *size), struct.pack(">II", *claimed))


def in_meta(data: bytes, path: list[bytes], more: bytes) -> bytes:
    """An AVIF with `more` at the end of a box within its `meta`; places of the data follow."""
    start, length = data.index(b"meta") - 4, len(more)
    patched = bytearray(data)
    ends = []
    for name in [b"meta", *path]:
        place = data.index(name, start) - 4
        (size,) = struct.unpack_from(">I", data, place)
        struct.pack_into(">I", patched, place, size + length)
        ends.append(place + size)
    iloc = data.index(b"iloc", start) + 4
    (count,) = struct.unpack_from(">H", data, iloc + 6)
    for i in range(count):  # version 0 with offsets and lengths of 4 bytes, as Pillow writes it
        place = iloc + 8 + 14 * i + 6
        struct.pack_into(">I", patched, place, struct.unpack_from(">I", data, place)[0] + length)
    return bytes(patched[: ends[-1]] + more + patched[ends[-1] :])


def box(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


# Color profiles -------------------------------------------------------------------------------

DISPLAY_P3 = (0.5151, 0.2412, -0.0011, 0.2920, 0.6922, 0.0419, 0.1571, 0.0666, 0.7841)
SRGB = (0.4361, 0.2225, 0.0139, 0.3851, 0.7169, 0.0971, 0.1431, 0.0606, 0.7141)


def icc_profile(
    tags: list[tuple[bytes, bytes]], space: bytes, connection: bytes = b"XYZ "
) -> bytes:
    """A version 2 profile (ICC.1:2001-04) of these tags."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags:
        place = 128 + 4 + 12 * len(tags) + len(body)
        table += name + struct.pack(">II", place, len(content))
        body += content + bytes(-len(content) % 4)
    head = bytearray(128)
    struct.pack_into(">I", head, 0, 128 + len(table) + len(body))
    head[8:12] = b"\2\x40\0\0"
    head[12:24] = b"mntr" + space + connection
    head[36:40] = b"acsp"
    struct.pack_into(">3i", head, 68, 63_190, 65_536, 54_061)  # D50
    return bytes(head) + table + body


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65_536) for value in values))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def rgb_profile(colorants: tuple[float, ...] = DISPLAY_P3, gamma: float = 2.2) -> bytes:
    """Red, green and blue as XYZ for D50 (three numbers each), and one gamma for all."""
    tags = [(b"wtpt", _xyz((0.9642, 1, 0.8249)))]
    for i, name in enumerate(b"rgb"):
        tags.append((bytes([name]) + b"XYZ", _xyz(colorants[3 * i : 3 * i + 3])))
        tags.append((bytes([name]) + b"TRC", _gamma(gamma)))
    return icc_profile(tags, b"RGB ")


def gray_profile(gamma: float) -> bytes:
    return icc_profile([(b"wtpt", _xyz((0.9642, 1, 0.8249))), (b"kTRC", _gamma(gamma))], b"GRAY")


def cmyk_profile(cyan: int) -> bytes:
    """Full cyan is a gray of this L*, 0 to 100; magenta and yellow are nothing, black is black."""
    lightness = [0 if i & 1 else cyan if i & 8 else 100 for i in range(16)]  # i is C, M, Y, K
    lab = b"".join(bytes([round(value * 2.55), 128, 128]) for value in lightness)
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", 65_536, 0, 0, 0, 65_536, 0, 0, 0, 65_536)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + lab + ramp * 3
    return icc_profile([(b"A2B0", table), (b"wtpt", _xyz((0.9642, 1, 0.8249)))], b"CMYK", b"Lab ")
