"""What this process may use of the machine: cores, memory and shared memory.

A container sees every core and all memory of its host. What it may use of them is written in its
control groups (cgroups, versions 1 and 2), which are read here.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")


class Group(NamedTuple):
    """A control group's folder, and the version of the interface that its files follow."""

    folder: Path
    version: int


def num_cores(root: Path = ROOT) -> int:
    """Count the cores that this process can keep busy: the lower of its affinity and CPU quota.

    A quota of 1.5 cores counts as 2. root: where /proc and /sys are read.
    """
    may_ask = hasattr(os, "sched_getaffinity")  # Linux alone
    seen = len(os.sched_getaffinity(0)) if may_ask else os.cpu_count() or 1
    quota = cpu_quota(root)
    return seen if quota is None else max(1, min(seen, math.ceil(quota)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many cores' time the control groups allow, as a float; None is no limit."""
    quotas = [_quota(group) for group in _groups("cpu", root)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Group) -> float | None:
    if group.version == 2:
        words = _read(group.folder / "cpu.max").split()
    else:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in names for word in _read(group.folder / name).split()]
    # "max" (version 2), "-1" (version 1) or an absent file is no limit.
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        return None
    return int(words[0]) / int(words[1])


def memory_limit(root: Path = ROOT) -> int | None:
    """Return the bytes of memory this process may use: its control groups' limit, or all there is.

    None where the system tells neither (Windows).
    """
    name = {1: "memory.limit_in_bytes", 2: "memory.max"}
    limits = [_read(group.folder / name[group.version]) for group in _groups("memory", root)]
    values = [int(limit) for limit in limits if limit.isdecimal()]
    # Version 1 writes "no limit" as a number beyond any memory; the physical size is lower.
    return min([*values, *_physical_memory()], default=None)


def _physical_memory() -> list[int]:
    if not hasattr(os, "sysconf"):
        return []
    return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]


def free_shared_memory(root: Path = ROOT) -> int | None:
    """Return the free bytes of /dev/shm, which data readers send batches through.

    None where there is no /dev/shm (macOS, Windows). Docker gives a container 64 MB in all.
    """
    try:
        status = os.statvfs(root / "dev/shm")
    except (OSError, AttributeError):  # no such folder; Windows has no statvfs
        return None
    return status.f_bavail * status.f_frsize


# Control groups -------------------------------------------------------------------------------


def _groups(controller: str, root: Path) -> Iterator[Group]:
    """Yield the group of this process and those around it: each one's limit holds for it.

    A controller is mounted in version 1 or 2, and a machine may use both for different ones.
    """
    of_version_1, of_version_2 = _paths(root)
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, options = mount.split(), kind.split()
        if len(fields) < 5 or len(options) < 3:
            continue
        if options[0] == "cgroup2":
            path, version = of_version_2, 2
        elif options[0] == "cgroup" and controller in options[2].split(","):
            path, version = of_version_1.get(controller), 1
        else:
            continue
        if path is not None:
            top = root / fields[4].lstrip("/")
            below = _below(path, fields[3])
            for folder in (top / below, *(top / parent for parent in below.parents)):
                yield Group(folder, version)


def _paths(root: Path) -> tuple[dict[str, str], str | None]:
    """Read which groups this process is in: controller -> path (version 1), path (version 2)."""
    of_version_1, of_version_2 = {}, None
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            of_version_2 = path
        else:
            of_version_1.update(dict.fromkeys(controllers.split(","), path))
    return of_version_1, of_version_2


def _below(path: str, mounted: str) -> Path:
    """Return a group's path below the group that is mounted.

    In a container the mounted group is often the container's own, while the path is counted from
    the host's root: what is mounted is then the nearest group that can be seen.
    """
    try:
        below = Path(path).relative_to(mounted)
    except ValueError:
        return Path()
    return Path() if ".." in below.parts else below


def _read(path: Path) -> str:
    """Return a file's text, or nothing: these files come and go with the kernel's configuration."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
