"""The token files of the parameter-golf challenge: reading, writing, and our shards made of them.

A file is a header of 256 little-endian int32 (magic, version, number of tokens, zeros) and the tokens as
little-endian uint16. Files of one split, in the order of their names, are one stream of BOS, document, BOS,
document, ... that is cut anywhere.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from .byte_table import byte_lengths
from .shards import BLOCK, TokenShards, write_atomically, write_stream
from .tokens import TextTokenizer

logger = logging.getLogger(__name__)

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
TOKENS_PER_FILE = 100_000_000
Split = Literal["train", "val"]


def challenge_files(folder: str | Path, split: Split) -> list[Path]:
    """The files of a split in a folder, in the order of the stream; none if there are none."""
    pattern = re.compile(rf".+_{split}_[0-9]+\.bin")
    return sorted(file for file in Path(folder).glob(f"*_{split}_*.bin") if pattern.fullmatch(file.name))


def read_challenge_file(file: str | Path) -> np.ndarray:
    """Tokens of one file, uint16 [tokens], read through a memory map.

    Raises:
        ValueError: for a missing or truncated file, another magic number or version, or a size that is not
            that of the tokens in the header.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give a .bin file of the challenge")
    size = file.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(f"{file} has {size} bytes, fewer than its header of {HEADER_BYTES}: get it again")
    magic, version, count = np.fromfile(file, dtype="<i4", count=3).tolist()
    if magic != MAGIC or version != VERSION:
        raise ValueError(
            f"{file}: expected magic {MAGIC} and version {VERSION}, found {magic} and {version}: "
            "it is not a token file of the challenge"
        )
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise ValueError(
            f"{file}: its header says {count} tokens, which take {HEADER_BYTES + 2 * count} bytes; the file has "
            f"{size}: get it again"
        )
    if count == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(file, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,)).view(np.ndarray)


def import_challenge(
    source: str | Path,
    split: Split,
    folder: str | Path,
    tokenizer: TextTokenizer,
    source_hash: str = "",
) -> TokenShards:
    """Copy a split into a folder of our shards: the same stream, token by token.

    The texts are not there, so `text_bytes` in the manifest are the bytes of the decoded tokens.

    Args:
        source: folder that holds the split's files.
        split: "train" or "val".
        folder: where the shards go; earlier ones are replaced.
        tokenizer: what the tokens were made with.
        source_hash: kept in the manifest.

    Raises:
        ValueError: for no files, a bad one, an id that the tokenizer does not have, or a stream without its
            BOS.
    """
    files = challenge_files(source, split)
    if not files:
        raise ValueError(f"{source} holds no *_{split}_*.bin: give the folder of the challenge's token files")
    table, bos_id = byte_lengths(tokenizer), tokenizer.bos_id
    text_bytes = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal text_bytes
        before = bos_id
        for number, file in enumerate(files):
            tokens = read_challenge_file(file)
            if number == 0 and tokens.size and tokens[0] != bos_id:
                logger.info(
                    "data: %s begins inside a document: its first token is not BOS (%d)", file, bos_id
                )
            for start in range(0, tokens.size, BLOCK):
                block = tokens[start : start + BLOCK]
                if block.max() >= tokenizer.vocab_size:
                    raise ValueError(
                        f"{file} has id {block.max()}, the tokenizer 0 to {tokenizer.vocab_size - 1}: "
                        "name the tokenizer that made it"
                    )
                text_bytes += table.count(block, np.concatenate([[before], block[:-1]]))
                before = int(block[-1])
                yield block

    return write_stream(
        folder,
        blocks(),
        tokenizer.vocab_size,
        bos_id,
        text_bytes=lambda: text_bytes,
        tokenizer_hash=tokenizer.hash,
        source_hash=source_hash,
    )


def export_challenge(
    shards: TokenShards, folder: str | Path, split: Split, tokens_per_file: int = TOKENS_PER_FILE
) -> list[Path]:
    """Write shards as files of the challenge, `fineweb_{split}_000000.bin` onwards.

    Args:
        shards: the stream; its ids must fit in 16 bits.
        folder: made if missing; it must hold no file of this split.
        split: "train" or "val".
        tokens_per_file: length of every file but the last, >= 1.

    Returns:
        The files, in their order.

    Raises:
        ValueError: for a larger vocabulary, files that are there already, or a size out of range.
    """
    if shards.vocab_size > 2**16:
        raise ValueError(
            f"vocab_size is {shards.vocab_size}, the challenge's files hold ids below 65536: "
            "use a smaller tokenizer"
        )
    if not 1 <= tokens_per_file < 2**31:
        raise ValueError(f"tokens_per_file is {tokens_per_file}, allowed 1 to 2**31 - 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if there := challenge_files(folder, split):
        raise ValueError(f"{there[0]} is there already: give an empty folder")
    files = []
    for number, start in enumerate(range(0, len(shards), tokens_per_file)):
        tokens = shards.tokens(start, min(start + tokens_per_file, len(shards)))
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = MAGIC, VERSION, tokens.size
        file = folder / f"fineweb_{split}_{number:06d}.bin"
        write_atomically(file, header.tobytes() + tokens.astype("<u2", copy=False).tobytes())
        files.append(file)
    return files
