"""Starting a process: its place among the others, the host's memory allocator, where compiled programs are kept."""

import ctypes
import os
import sys
from pathlib import Path


def home() -> Path:
    """Where pulled models, token stores and compiled programs are kept: $LLMOS_HOME, or ~/.cache/llmos."""
    return Path(os.environ.get("LLMOS_HOME") or Path.home() / ".cache" / "llmos").expanduser()


def prepare_host() -> None:
    """Tells glibc's allocator to keep large freed blocks.

    XLA's CPU client allocates and frees every temporary; returned to the kernel, each comes back as page faults.
    Elsewhere than on glibc this does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)
    mallopt(m_top_pad, 256 * 2**20)
