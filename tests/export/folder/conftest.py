"""The export of a small student."""

from pathlib import Path

import pytest

from trihybrid.export.folder.write import export_folder


@pytest.fixture(scope="session")
def exported(student: Path) -> Path:
    """Its export, not to be changed."""
    out = student.with_name("exported")
    export_folder(student, out)
    return out
