"""The memory of this process on Linux with glibc: what is resident, the peak, and whether freed memory is kept."""

import ctypes
import pathlib

LIBC = ctypes.CDLL(None)


def status(field):
    """Bytes of a field of /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def forget_peak():
    """Gives back what is free, starts the peak afresh and returns what is resident."""
    LIBC.malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def keep_freed_memory():
    """Tells glibc to keep what is freed for the next step, as PyTorch's own allocator does on a GPU."""
    m_trim_threshold, m_mmap_max = -1, -4
    LIBC.mallopt(m_mmap_max, 0)
    LIBC.mallopt(m_trim_threshold, -1)
