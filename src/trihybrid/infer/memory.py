"""How much memory is free, so that what cannot fit is told in bytes before anything is allocated."""

from pathlib import Path

import torch

MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had there: of a GPU what the driver and torch's own pool have free, of the machine what
    Linux calls available. None where nobody says."""
    if device.type == "cuda":
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + pooled
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    found = [
        line for line in MEMINFO.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable:")
    ]
    return 1024 * int(found[0].split()[1]) if found else None


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.2f} GiB"
