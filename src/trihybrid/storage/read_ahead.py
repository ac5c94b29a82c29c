"""Fetching the beginning of a folder's weights from the disk while the program itself is still being loaded.

To import torch and transformers takes seconds in which a disk would be idle. This file imports neither.
"""

import os
from pathlib import Path
from threading import Thread

MOST = 4 << 30
"""Bytes at most; and never more than half of the memory that nobody uses."""
STEP = 1 << 26


def read_ahead(folder: Path) -> Thread | None:
    """Ask the operating system to hold the first bytes of a folder's weights ready, in a thread that ends by itself.

    Returns the thread; None for a folder without weights, or where the system takes no such request.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not hasattr(os, "posix_fadvise"):
        return None
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    thread = Thread(target=_ask, args=(files, min(MOST, free // 2)), name="read ahead", daemon=True)
    thread.start()
    return thread


def _ask(files: list[Path], budget: int) -> None:
    for path in files:
        try:
            with path.open("rb") as file:
                end = min(budget, os.fstat(file.fileno()).st_size)
                # Step by step, so that what comes first is asked for first.
                for place in range(0, end, STEP):
                    step = min(STEP, end - place)
                    os.posix_fadvise(file.fileno(), place, step, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # whoever reads the file in earnest says what is wrong with it
        budget -= end
