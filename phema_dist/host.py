"""How much memory this machine gives to a process: physical memory, or less where a cgroup limits it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_FILES = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}


def memory_limit(root: Path = Path("/")) -> tuple[int, str] | None:
    """The least of physical memory and the limits of this process's cgroups, v1 and v2, and which that is.

    None where neither can be read (not Linux). `root` is where /proc and /sys are.
    """
    return min((*_physical(root), *_cgroups(root)), default=None)


def shortage(bytes_per_rank: int, ranks_per_node: int, limit: tuple[int, str] | None) -> str:
    """In words, that a node's ranks need more than it gives them; "" if they do not, or no limit is known."""
    needed = bytes_per_rank * ranks_per_node
    if limit is None or needed <= limit[0]:
        return ""
    return (
        f"the averages of {ranks_per_node} ranks need {needed / 1e9:.3g} GB of host memory on a node, beside what "
        f"training needs; {limit[1]} is {limit[0] / 1e9:.3g} GB. Use more nodes, fewer sigma_rels or fp16 snapshots."
    )


def _physical(root: Path) -> Iterator[tuple[int, str]]:
    """From a line such as `MemTotal:       16384 kB`."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            yield int(line.split()[1]) * 1024, "physical memory"


def _cgroups(root: Path) -> Iterator[tuple[int, str]]:
    """Limits of a cgroup and of those around it. Inside of a container its path may lead nowhere, but the top is there.

    Lines are `0::/path` (v2) or `4:memory:/path` (v1); without a limit, v2 says max and v1 a number above any memory.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for controller in {"", "memory"} & set(controllers.split(",")):
            folder, name = _FILES[controller]
            place = Path(path.strip("/"))
            for group in (place, *place.parents):
                for limit in _lines(root / folder / group / name):
                    if limit.isdigit():
                        yield int(limit), f"the limit of its cgroup ({name})"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
