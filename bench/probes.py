"""What the kernel knows of a process tree (CPU, memory) and of the machine. Reads /proc only."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


def process_tree(root: int) -> list[int]:
    """The process and all its living descendants, so that worker processes are never forgotten."""
    tree = [root]
    for pid in tree:
        for children in _PROC.glob(f"{pid}/task/*/children"):
            try:
                tree.extend(int(child) for child in children.read_text().split())
            except OSError:
                continue  # the thread ended between listing and reading
    return tree


def cpu_ns(root: int) -> int:
    """User and system time of the tree, in nanoseconds, all threads included, ended ones too.

    The kernel keeps a clock for each process; `clock_getcpuclockid` derives its id from the pid
    like this. It is exact, where /proc/PID/stat counts ticks of 10 ms and /proc/PID/schedstat
    counts the main thread only.
    """
    total = 0
    for pid in process_tree(root):
        try:
            total += time.clock_gettime_ns((~pid << 3) | 2)
        except OSError:
            continue  # gone between listing and reading
    return total


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a tree, in bytes; `pss` counts a page shared by n processes as 1/n."""

    rss: int
    pss: int


def memory(root: int) -> Memory:
    rss = pss = 0
    for pid in process_tree(root):
        try:
            lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if line.startswith("Rss:"):
                rss += int(line.split()[1]) * 1024
            elif line.startswith("Pss:"):
                pss += int(line.split()[1]) * 1024
    return Memory(rss, pss)


def threads(root: int) -> int:
    return sum(len(list(_PROC.glob(f"{pid}/task/*"))) for pid in process_tree(root))


@dataclass(frozen=True, slots=True)
class Jiffies:
    """The machine's own time sheet, in ticks since boot."""

    total: int
    idle: int
    stolen: int
    """Time in which the hypervisor ran somebody else on our cores."""


def jiffies() -> Jiffies:
    fields = [int(field) for field in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    return Jiffies(total=sum(fields), idle=fields[3] + fields[4], stolen=fields[7])


def cpu_model() -> str:
    for line in (_PROC / "cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model", "Hardware")):
            return line.split(":", 1)[1].strip()
    return os.uname().machine
