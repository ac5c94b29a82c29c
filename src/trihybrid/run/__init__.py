"""One execution on disk: its directory, its lineage and its log."""

from trihybrid.run.directory import RunDirectory, write_json, write_text
from trihybrid.run.lineage import Lineage, LineageRecord, hash_file, hash_folder, hash_json
from trihybrid.run.log import RunLog, StepRecord, memory_bytes, read_log

__all__ = [
    "Lineage",
    "LineageRecord",
    "RunDirectory",
    "RunLog",
    "StepRecord",
    "hash_file",
    "hash_folder",
    "hash_json",
    "memory_bytes",
    "read_log",
    "write_json",
    "write_text",
]
