"""A zip archive that Python runs as a program, the same bytes for the same members, which lists the hashes of these."""

import hashlib
import io
import json
import zipfile

from trihybrid.export.entry import MEMBERS

SHEBANG = b"#!/usr/bin/env python3\n"


def pack(texts: dict[str, str]) -> bytes:
    """A zip archive that Python runs, of these members and the list of their hashes; equal texts give equal bytes.

    Args:
        texts: name inside the archive -> content; `__main__.py` is what runs.
    """
    members = {name: text.encode("utf-8") for name, text in sorted(texts.items())}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in members.items()}
    members[MEMBERS] = json.dumps(hashes, separators=(",", ":")).encode("ascii")
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, wherever this runs: the system is written into the archive
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    return buffer.getvalue()
