"""From text to batches of tokens: documents, tokenizer, shards on disk, packed windows, recall probes.

This room knows nothing of models.
"""

from .packing import Batch, PackedBatches, sequential
from .probes import RecallDocument, RecallSet, encode_probe, mix_documents, recall_documents
from .section import DataSection, PreparedData, RecallSection, prepare
from .shards import TokenShards, write_shards
from .text import deduplicate, read_documents, split_documents
from .tokens import Tokenizer

__all__ = [
    "Batch",
    "DataSection",
    "PackedBatches",
    "PreparedData",
    "RecallDocument",
    "RecallSection",
    "RecallSet",
    "TokenShards",
    "Tokenizer",
    "deduplicate",
    "encode_probe",
    "mix_documents",
    "prepare",
    "read_documents",
    "recall_documents",
    "sequential",
    "split_documents",
    "write_shards",
]
