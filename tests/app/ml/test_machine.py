"""What this process may use, read from trees that look like machines and containers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.cpu_groups import cpu_group

from app.ml import machine

BACKEND = Path(__file__).resolve().parents[3] / "backend"
V1_CPU = (
    "31 23 0:28 {mounted} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct"
)
V1_MEMORY = "32 23 0:29 {mounted} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2 = "30 23 0:27 {mounted} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
OTHERS = "23 1 8:1 / / rw - ext4 /dev/sda1 rw\n24 23 0:22 / /sys rw - sysfs sysfs rw"
PHYSICAL_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED = str(2**63 - 4096)  # what version 1 writes where there is no limit


def tree(root: Path, mounts: list[str], groups: str, files: dict[str, str]) -> Path:
    """A machine's /proc/self and /sys/fs/cgroup."""
    texts = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    texts |= {"proc/self/mountinfo": "\n".join([OTHERS, *mounts]), "proc/self/cgroup": groups}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


pytestmark = pytest.mark.usefixtures("eight_cores")


def v1(root: Path, quota: str, period: str = "100000", path: str = "/") -> Path:
    folder = f"cpu,cpuacct{path.rstrip('/')}"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}
    return tree(root, [V1_CPU.format(mounted="/")], f"4:cpu,cpuacct:{path}", files)


def v2(root: Path, cpu_max: str, path: str = "/") -> Path:
    files = {f"{path.strip('/')}/cpu.max": cpu_max}
    return tree(root, [V2.format(mounted="/")], f"0::{path}", files)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("-1", 8), ("100000", 1), ("200000", 2), ("150000", 2), ("1000", 1), ("1600000", 8)],
)
def test_the_quota_of_version_1_counts(quota: str, cores: int, tmp_path: Path) -> None:
    assert machine.num_cores(v1(tmp_path, quota)) == cores


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("max 100000", 8), ("100000 100000", 1), ("250000 100000", 3), ("5000 50000", 1), ("", 8)],
)
def test_the_quota_of_version_2_counts(cpu_max: str, cores: int, tmp_path: Path) -> None:
    assert machine.num_cores(v2(tmp_path, cpu_max)) == cores


def test_the_affinity_counts_below_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert machine.num_cores(v2(tmp_path, "400000 100000")) == 1


@pytest.mark.parametrize(("inner", "outer"), [("300000", "max"), ("max", "300000")])
def test_the_lowest_quota_of_nested_groups_counts(inner: str, outer: str, tmp_path: Path) -> None:
    files = {"a.slice/cpu.max": f"{outer} 100000", "a.slice/b.scope/cpu.max": f"{inner} 100000"}
    tree(tmp_path, [V2.format(mounted="/")], "0::/a.slice/b.scope", files)
    assert machine.num_cores(tmp_path) == 3


def test_nested_groups_of_version_1(tmp_path: Path) -> None:
    v1(tmp_path, "200000")
    v1(tmp_path, "-1", path="/docker/abc")
    assert machine.num_cores(tmp_path) == 2


def test_a_group_beside_ours_does_not_count(tmp_path: Path) -> None:
    v2(tmp_path, "100000 100000", path="/theirs")
    v2(tmp_path, "max 100000", path="/ours")
    assert machine.num_cores(tmp_path) == 8


@pytest.mark.parametrize("path", ["/", "/docker/abc", "/../../host.slice", "/docker/other"])
def test_in_a_container_its_own_group_is_the_top_of_what_is_mounted(
    path: str, tmp_path: Path
) -> None:
    """With a cgroup namespace the path is /; without, it is counted from the host's root."""
    mounted = "/docker/abc" if path.startswith("/docker") else "/"
    tree(
        tmp_path,
        [V1_CPU.format(mounted=mounted), V1_MEMORY.format(mounted=mounted)],
        f"5:memory:{path}\n4:cpu,cpuacct:{path}",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": "1000000",
        },
    )
    assert machine.num_cores(tmp_path) == 2
    assert machine.memory_limit(tmp_path) == 1_000_000


def test_a_machine_that_uses_both_versions(tmp_path: Path) -> None:
    """As systemd's hybrid layout: version 2 is mounted beside and has no controllers."""
    v1(tmp_path, "300000")
    text = (tmp_path / "proc/self/mountinfo").read_text()
    unified = V2.format(mounted="/").replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ")
    (tmp_path / "proc/self/mountinfo").write_text(text + unified + "\n")
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/\n0::/\n")
    assert machine.num_cores(tmp_path) == 3


@pytest.mark.parametrize("text", ["", "garbage", "100000", "100000 0", "0 100000", "x y", "\x00"])
def test_a_file_that_says_nothing_useful_is_no_limit(text: str, tmp_path: Path) -> None:
    assert machine.num_cores(v2(tmp_path, text)) == 8
    assert machine.cpu_quota(tmp_path) is None


def test_a_system_without_these_files_has_no_limits(tmp_path: Path) -> None:
    assert machine.num_cores(tmp_path) == 8
    assert machine.cpu_quota(tmp_path) is None
    assert machine.memory_limit(tmp_path) == PHYSICAL_MEMORY
    assert machine.free_shared_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("mount", "groups", "name", "unlimited"),
    [
        (V2, "0::/a", "a/memory.max", "max"),
        (V1_MEMORY, "5:memory:/a", "memory/a/memory.limit_in_bytes", UNLIMITED),
    ],
)
def test_the_memory_limit_is_the_groups_or_the_machines(
    mount: str, groups: str, name: str, unlimited: str, tmp_path: Path
) -> None:
    root = tree(tmp_path, [mount.format(mounted="/")], groups, {name: "536870912"})
    assert machine.memory_limit(root) == 2**29
    (root / "sys/fs/cgroup" / name).write_text(unlimited)
    assert machine.memory_limit(root) == PHYSICAL_MEMORY


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_free_shared_memory_is_what_dev_shm_has_left() -> None:
    free = machine.free_shared_memory()
    assert free is not None and free > 0


# A real group ---------------------------------------------------------------------------------


def test_a_process_in_a_real_group_sees_its_quota() -> None:
    with cpu_group(1.2) as group:
        code = (
            "import os, sys\n"
            f"open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
            f"sys.path.insert(0, {str(BACKEND)!r})\n"
            "from app.ml.machine import cpu_quota, num_cores\n"
            "print(cpu_quota(), num_cores() == min(2, len(os.sched_getaffinity(0))))"
        )
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.stdout == "1.2 True\n", result.stderr
