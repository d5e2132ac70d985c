"""How much memory there is, so that what cannot fit is said before it is tried: Linux promises more than it has, and kills who takes it."""

import os
from pathlib import Path


def total() -> int:
    """Bytes of this machine; of the container where it has a limit of its own."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**50
    try:
        return min(whole, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return whole
