"""How far a build of shards is, so that one that was killed goes on and ends with the same bytes.

`journal.json` lies beside the shards until the manifest replaces it. It has a mark for each finished shard: where its
last token stands among the batches of encoded documents. A build that goes on reads the documents before that place
without encoding them.
"""

import hashlib
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .shards import ShardEntry, write_atomically

logger = logging.getLogger(__name__)

JOURNAL = "journal.json"


class Mark(BaseModel):
    """The end of a finished shard."""

    model_config = ConfigDict(extra="forbid")
    shard: ShardEntry = Field(description="the file")
    documents: int = Field(ge=0, description="BOS in this shard and those before it")
    batches: int = Field(ge=0, description="batches before the one that the shard ends in")
    offset: int = Field(ge=0, description="tokens of that batch that are in shards")
    text_bytes: int = Field(ge=0, description="UTF-8 bytes of the documents of the batches before it")
    skipped: int = Field(ge=0, description="documents of those batches that encode to nothing")


class _Contents(BaseModel):
    model_config = ConfigDict(extra="forbid")
    build: str
    marks: list[Mark]


class Journal:
    """The marks of a build.

    Args:
        folder: of the shards.
        build: hash of all that decides the shards' bytes and the batches; marks of another build do not count.

    Attributes:
        marks: those whose shards are there, whole and unchanged, from the first on.
    """

    def __init__(self, folder: Path, build: str) -> None:
        self._file = folder / JOURNAL
        self._build = build
        self.marks = self._read(folder)
        if self.marks:
            logger.info("data: %s goes on behind %d finished shards", folder, len(self.marks))

    def add(self, mark: Mark) -> None:
        """Write down a finished shard."""
        self.marks.append(mark)
        contents = _Contents(build=self._build, marks=self.marks)
        write_atomically(self._file, (contents.model_dump_json(indent=2) + "\n").encode())

    def close(self) -> None:
        """Remove the file: the build is done."""
        self._file.unlink(missing_ok=True)

    def _read(self, folder: Path) -> list[Mark]:
        if not self._file.is_file():
            return []
        try:
            contents = _Contents.model_validate_json(self._file.read_bytes())
        except ValidationError:
            logger.warning("data: %s is damaged, the build begins anew", self._file)
            return []
        if contents.build != self._build:
            logger.info("data: %s is of other text or settings, the build begins anew", self._file)
            return []
        marks = []
        for mark in contents.marks:
            file = folder / mark.shard.file
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != mark.shard.sha256:
                logger.warning("data: %s is not as the build left it and is made again", file)
                break
            marks.append(mark)
        return marks
