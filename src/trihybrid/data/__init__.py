"""From text to batches of tokens: documents, tokenizer, shards on disk, packed windows, recall probes.

This room knows nothing of models.
"""

from .byte_table import ByteTable, byte_lengths, check_table
from .carry import carry_tokenizer
from .challenge import challenge_files, export_challenge, import_challenge, read_challenge_file
from .corpus import Corpus, CorpusSection, prepare_corpus
from .packing import Batch, PackedBatches, sequential
from .prefetch import Prefetch
from .probes import RecallDocument, RecallSet, encode_probe, mix_documents, recall_documents
from .section import DataSection, PreparedData, RecallSection, prepare, prepare_held_out
from .sentencepiece import SentencePieceTokenizer, open_tokenizer
from .shards import TokenShards, write_shards, write_stream
from .text import deduplicate, read_documents, split_documents, stream_documents
from .tokens import TextTokenizer, Tokenizer

__all__ = [
    "Batch",
    "ByteTable",
    "Corpus",
    "CorpusSection",
    "DataSection",
    "PackedBatches",
    "Prefetch",
    "PreparedData",
    "RecallDocument",
    "RecallSection",
    "RecallSet",
    "SentencePieceTokenizer",
    "TextTokenizer",
    "TokenShards",
    "Tokenizer",
    "byte_lengths",
    "carry_tokenizer",
    "challenge_files",
    "check_table",
    "deduplicate",
    "encode_probe",
    "export_challenge",
    "import_challenge",
    "mix_documents",
    "open_tokenizer",
    "prepare",
    "prepare_corpus",
    "prepare_held_out",
    "read_challenge_file",
    "read_documents",
    "recall_documents",
    "sequential",
    "split_documents",
    "stream_documents",
    "write_shards",
    "write_stream",
]
