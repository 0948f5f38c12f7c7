"""What the markers of a JPEG say about it: its cost, its metadata, and where its data ends."""

import re
import struct
from typing import NamedTuple

from app.ml.containers import (
    PADDING,
    Container,
    ImageTooLargeError,
    Probe,
    UnreadableImageError,
    find_orientation,
    run_at_end,
)

MAX_SEGMENTS = 5_000  # 20 MB of metadata in the longest segments are 320
MAX_SCANS = 100  # real files have at most 15
MAX_TABLES = 1 << 16  # bytes in front of the pixels, metadata left out; real files have 1,000
MAX_FILL = 1 << 14  # fill bytes in a row; the decoder reads a longer run again and again

HOLE = bytes(PADDING)
FILLER = bytes(range(1, 255))  # put where the data ends: what is still wanted shows
# Scan data holds no marker: its own 0xFF are followed by 0x00 or by the number of a restart.
MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
SOI, EOI, SOS, DHT = 0xD8, 0xD9, 0xDA, 0xC4
SEQUENTIAL = {0xC0, 0xC1}
PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
FRAMES = set(range(0xC0, 0xD0)) - {DHT, 0xC8, 0xCC}
TABLES = set(range(0xC0, 0xE0)) - {SOI, EOI, SOS}  # the frame, too
JFIF, ADOBE = (0xE0, b"JFIF\0"), (0xEE, b"Adobe")  # they say which color model the data has
EXIF = (0xE1, b"Exif\0\0")
XMP = (0xE1, b"http://ns.adobe.com/xap/1.0/\0")
ICC = (0xE2, b"ICC_PROFILE\0")


class _Segment(NamedTuple):
    marker: int
    start: int
    payload: memoryview


class _Frame(NamedTuple):
    """The frame's kind, and each component's number and its blocks of 8x8 samples."""

    marker: int
    components: list[tuple[int, int]]

    @property
    def blocks(self) -> int:
        return sum(blocks for _, blocks in self.components)


class _Scan(NamedTuple):
    """The numbers of a scan's components, their tables (AC in the lower 4 bits), and its effort.

    Effort is how long a block of it takes, as measured: 1 is some 27 ns. final: the coefficients
    that have all their bits after it.
    """

    components: tuple[int, ...]
    tables: tuple[int, ...]
    effort: int
    final: range

    def work(self, frame: _Frame) -> int:
        return self.effort * sum(n for number, n in frame.components if number in self.components)


def read_jpeg(data: bytes) -> Container:
    """The first picture in the file, without its metadata and whatever follows it."""
    segments = _segments(data)
    first = next((i for i, segment in enumerate(segments) if segment.marker == SOS), None)
    if first is None:
        raise UnreadableImageError("the image is cut off or damaged at its start")
    header, rest = segments[:first], segments[first:]
    scans = [_scan(segment.payload) for segment in rest if segment.marker == SOS]
    if len(scans) > MAX_SCANS:
        raise ImageTooLargeError(f"the JPEG has {len(scans):,} scans; the limit is {MAX_SCANS}")
    frame, head = _frame(header), _head(header)
    several = frame.marker in PROGRESSIVE or len(scans[0].components) < len(frame.components)
    start, (end, closing) = rest[0].start, _end(data, rest, several)
    scan_end = rest[1].start if len(rest) > 1 else end
    if data.find(b"\xff" * MAX_FILL, start, end) >= 0:
        raise UnreadableImageError("the image data is damaged: a part of it is filled up")
    if not _zeros_may_be(frame, header, scans[0]) and data.find(HOLE, start, scan_end) >= 0:
        raise UnreadableImageError("the image data is damaged: a part of it is missing")
    suspect = several and _may_lack_scans(frame, scans)
    probed = rest[-1].start if suspect and rest[-1].marker == EOI else scan_end
    place = len(head) + probed - start
    return Container(
        "JPEG",
        b"".join([head, memoryview(data)[start:end], closing]),
        orientation=_orientation(header),
        profile=_profile(header),
        coefficients=128 * frame.blocks if several else 0,
        scans=len(scans),
        work=(1 + suspect) * sum(scan.work(frame) for scan in scans),  # decoded twice
        probe=Probe(place, place, (_filler(data[start:scan_end]),), shows=False, suspect=suspect),
    )


def _filler(scan: bytes) -> bytes:
    """More data for the scan; where an interval ends, the decoder looks for the next restart."""
    restarts = RESTART.findall(scan)
    following = bytes([0xD0 | (restarts[-1][0] + 1) % 8]) if restarts else b"\xd0"
    return FILLER * 4 + b"\xff" + following + FILLER


def _segments(data: bytes) -> list[_Segment]:
    """All segments up to the picture's end; junk, fill bytes and scan data are stepped over."""
    segments: list[_Segment] = []
    position, in_scans, view = 2, False, memoryview(data)
    while len(segments) < MAX_SEGMENTS:
        match = MARKER.search(data, position)
        if match is None:
            return segments
        marker, position = match[1][0], match.end()
        in_scans |= marker == SOS
        if marker not in (SOI, EOI):
            position += max(2, int.from_bytes(view[position : position + 2], "big"))
        segments.append(_Segment(marker, match.start(), view[match.end() + 2 : position]))
        if in_scans and marker == EOI:
            return segments
    raise ImageTooLargeError(f"the JPEG has more than {MAX_SEGMENTS:,} segments")


def _frame(header: list[_Segment]) -> _Frame:
    frames = [segment for segment in header if segment.marker in FRAMES]
    marker, _, payload = frames[-1]
    _, height, width, count = struct.unpack_from(">BHHB", payload)
    sampling = [
        (number, both >> 4, both & 15)
        for number, both, _ in struct.iter_unpack("BBB", payload[6 : 6 + 3 * count])
    ]
    across, down = max(h for _, h, _ in sampling), max(v for _, _, v in sampling)
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    return _Frame(marker, [(number, units * h * v) for number, h, v in sampling])


def _scan(payload: memoryview) -> _Scan:
    """The scan header (ITU-T T.81, section B.2.3)."""
    end = 1 + 2 * payload[0]
    first, last, bits = payload[end : end + 3]
    if first == 0 and last > 0:  # the only pass over its blocks, which also transforms them
        effort = 3
    elif first > 0 and bits >> 4:  # refines, for which it looks at every coefficient
        effort = 1 + max(0, last - first) // 8
    else:
        effort = 1
    final = range(first, last + 1 if bits & 15 == 0 else first)
    return _Scan(tuple(payload[1:end:2]), tuple(payload[2:end:2]), effort, final)


def _may_lack_scans(frame: _Frame, scans: list[_Scan]) -> bool:
    """Whether a file of several scans may be one that was cut and closed.

    A progressive one brings all coefficients to their last bit, unless its end is missing. Of the
    others any scan may be cut without a trace, and they are rare.
    """
    given = {(number, k) for scan in scans for number in scan.components for k in scan.final}
    return frame.marker not in PROGRESSIVE or len(given) < 64 * len(frame.components)


def _head(header: list[_Segment]) -> bytes:
    """The tables, the frame and the color model: all that decoding needs before the scans."""
    kept = [
        b"".join([bytes([0xFF, s.marker]), (len(s.payload) + 2).to_bytes(2, "big"), s.payload])
        for s in header
        if s.marker in TABLES or _is(s, JFIF) or _is(s, ADOBE)
    ]
    head = b"\xff\xd8" + b"".join(kept)
    if len(head) > MAX_TABLES:
        raise ImageTooLargeError(f"the JPEG has more than {MAX_TABLES:,} bytes of tables")
    return head


def _end(data: bytes, rest: list[_Segment], several: bool) -> tuple[int, bytes]:
    """Where the picture's data ends, and what closes it there.

    Padding in the place of the end marker is taken off: the decoder would take it for pixels, and
    the probe tells whether any are missing. In several scans the decoder misses the marker itself.
    """
    if rest[-1].marker == EOI:
        return rest[-1].start + 2, b""
    padding = 0 if several else run_at_end(memoryview(data)[rest[-1].start :])
    return (len(data) - padding + 4, b"\xff\xd9") if padding else (len(data), b"")


def _zeros_may_be(frame: _Frame, header: list[_Segment], scan: _Scan) -> bool:
    """Whether an encoder can have written a long run of zeros into the scan.

    Only if zeros stand for the end of a block, as in flat pictures with tables of their own. With
    the usual tables they stand for 63 coefficients of -1 in each block.
    """
    if frame.marker not in SEQUENTIAL:
        return True
    codes = _zero_codes(header)
    return all(codes.get(tables & 15, 0) & 15 == 0 for tables in scan.tables)


def _zero_codes(header: list[_Segment]) -> dict[int, int]:
    """For each Huffman table of AC coefficients, the symbol whose code is all zeros: its first."""
    codes = {}
    for segment in header:
        tables = segment.payload if segment.marker == DHT else b""
        while len(tables) > 17:
            if tables[0] >> 4:
                codes[tables[0] & 15] = tables[17]
            tables = tables[17 + sum(tables[1:17]) :]
    return codes


def _is(segment: _Segment, kind: tuple[int, bytes]) -> bool:
    marker, name = kind
    return segment.marker == marker and segment.payload[: len(name)] == name


def _metadata(header: list[_Segment], kind: tuple[int, bytes]) -> list[bytes]:
    """The contents of the segments of one kind, without its name."""
    return [bytes(s.payload[len(kind[1]) :]) for s in header if _is(s, kind)]


def _orientation(header: list[_Segment]) -> int:
    xmp = _metadata(header, XMP)
    return find_orientation(b"".join(_metadata(header, EXIF)), xmp[-1] if xmp else b"")


def _profile(header: list[_Segment]) -> bytes | None:
    """The profile's parts in their order, if none is missing (ICC.1, annex B.4)."""
    parts = sorted(_metadata(header, ICC))
    if not parts or any(len(part) < 2 for part in parts) or parts[0][1] != len(parts):
        return None
    return b"".join(part[2:] for part in parts)
