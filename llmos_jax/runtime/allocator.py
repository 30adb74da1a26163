"""How glibc's malloc serves a process that computes on a CPU. It reads this once, as the process starts."""

import os
import sys

# XLA allocates its temporaries anew for every step. In huge pages (one page fault for 2 MiB where there are 512), and from
# heaps that keep what is freed, a training step of 60 million parameters takes 5.1 s in place of 6.1 (docs/log.md). Names and
# units: glibc's manual, "Memory Allocation Tunables"; a version that does not know one of them goes without it.
TUNABLES = {"hugetlb": 1, "mmap_threshold": 16 * 2**30, "trim_threshold": 32 * 2**30, "top_pad": 256 * 2**20}


def environment() -> dict[str, str]:
    """What to add to the environment of a process that computes; nothing where its user has set it, or without glibc."""
    if "GLIBC_TUNABLES" in os.environ or sys.platform != "linux":
        return {}
    return {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}


def restart() -> None:
    """Starts this very command again with `environment`, if it was not: same process id, same files, some 30 ms."""
    added = environment()
    if added:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)
