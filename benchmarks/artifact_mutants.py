"""Mutants of small valid artifacts: damaged blindly, or hostile with every checksum and length made right again."""

import functools
import hashlib
import json
import lzma
import random
import struct
import zlib
from typing import Any

import numpy as np

from trihybrid.compress.container import StoredTensor, encode_container

HEADER_BYTES = 48
CODECS = ("packed", "rans", "stored", "zlib", "lzma", "zstd", "brotli")
BOMBS = ("zlib", "lzma", "zstd", "zstd window", "brotli")
SUMS = ("ledger_bytes", "tensor_bytes", "file_bytes", "total_bytes")
# A value of the wrong type, out of range, or right for another field.
HOSTILE: tuple[Any, ...] = (
    *(0, -1, 1, 2, 7, 8, 9, 16, 2**15, 2**20, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**30),
    *(1.0, 1.5, -0.0, 1e308, 1e-320, None, True, False, "", "x", "x" * 300, "\0", "\ud800", "0" * 64),
    *("../../etc/passwd", "int8", "float16", "float32", "float64", "quantised", "plain", "pickle", *CODECS),
    *([], {}, [1], [0, 0], [2**20, 2**20], [2**32, 2**32], [-1, -1], [1] * 9, {"a": 1}, [[[[]]]]),
)
# Instead of a whole ledger.
HOSTILE_TEXTS = (
    *(b"", b"{}", b"[]", b"null", b"0", b'"x"', b"NaN", b"{", b"\xef\xbb\xbf{}", b"\xff\xfe", b"\0" * 64),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 500_000 + b"]" * 500_000, b"9" * 1_000_000, b'"' * 99_999),
    *(b'{"a":"' + b"\\" * 200_000 + b'"}', b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", b"1e999", b" " * 2**20),
)


def seed_artifacts() -> list[bytes]:
    """Valid files of at most 20 kB: one for every codec, one that mixes them, one with two lanes of rans."""
    generator = np.random.default_rng(0)

    def quantised(name: str, rows: int, columns: int, bits: int) -> StoredTensor:
        half = 2 ** (bits - 1)
        sizes = np.exp(0.5 * generator.standard_normal((rows, 1))) * half / 4
        integers = np.rint(np.clip(sizes * generator.standard_normal((rows, columns)), -half, half - 1))
        scales = (0.01 * generator.random(rows) + 0.01).astype(np.float16)
        return StoredTensor(name, integers.astype(np.int8), scales, bits)

    tensors = [
        quantised("blocks.0.mixer.query.weight", 16, 20, 6),
        quantised("blocks.0.mlp.up.weight", 32, 12, 5),
        StoredTensor("blocks.0.mixer.decay", generator.standard_normal(40).astype(np.float32)),
        StoredTensor("scale", np.array(1.5, np.float16)),
        quantised("embedding.weight", 24, 16, 8),
    ]
    configuration = {
        "format": 1,
        "section": {"hidden_size": 24, "legend": {"T": ["a", 0.5, None]}},
        "parameters": 3,
    }
    choices = [(codec, tensors) for codec in ("smallest", *CODECS)]
    choices.append(("rans", [quantised("blocks.0.mlp.down.weight", 72, 64, 6)]))
    files = [b"".join(encode_container(held, configuration, 1234, codec)[1]) for codec, held in choices]
    assert all(len(data) <= 20_000 for data in files)
    return files


def make_mutant(originals: list[bytes], seed: int, number: int) -> tuple[str, bytes, bytes]:
    """(kind, the valid file, its mutant); kinds begin with "blind" or "repaired"."""
    chance = random.Random(f"{seed} {number}")
    original = chance.choice(originals)
    if number % 2 == 0:
        kind = chance.choice(("flip", "cut", "extend", "splice", "overwrite", "header"))
        return f"blind {kind}", original, damage(original, kind, chance, chance.choice(originals))
    kind = chance.choice(("part", "part", "rans table", "field", "field", "field", "order", "bomb", "text"))
    return f"repaired {kind}", original, hostile(original, kind, chance)


def damage(data: bytes, kind: str, chance: random.Random, other: bytes) -> bytes:
    """Bytes changed without regard to what they mean."""
    mutant = bytearray(data)
    if kind == "flip":
        for _ in range(chance.choice((1, 1, 2, 8))):
            mutant[chance.randrange(len(mutant))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del mutant[chance.choice((chance.randrange(len(mutant)), len(mutant) - 1)) :]
    elif kind == "extend":
        mutant += chance.choice((b"\0", data, chance.randbytes(chance.randrange(1, 5000))))
    elif kind == "splice":
        size = chance.randrange(1, 1 + min(len(data), len(other), chance.choice((4, 64, 20_000))))
        source, target = chance.randrange(len(other)), chance.randrange(len(mutant))
        mutant[target : target + chance.choice((0, size))] = other[source : source + size]
    elif kind == "overwrite":
        target = chance.randrange(len(mutant))
        mutant[target : target + 8] = struct.pack("<q", chance.choice((-1, 0, 2**31, 2**62)))
    else:
        mutant[chance.randrange(min(HEADER_BYTES, len(mutant)))] = chance.randrange(256)
    return bytes(mutant)


def hostile(data: bytes, kind: str, chance: random.Random) -> bytes:
    """A file made anew around a change, so that all sums but the changed one are right."""
    length = struct.unpack_from("<I", data, 12)[0]
    text, content = data[HEADER_BYTES:][:length], data[HEADER_BYTES + length :]
    if kind == "text":
        whole = chance.random() < 0.5
        return with_text(chance.choice(HOSTILE_TEXTS) if whole else awkward(text, chance), content)
    fields = json.loads(text)
    parts = {}
    for entry in fields["tensors"]:
        for role in ("values", "scales"):
            if role in entry:
                record = entry[role]
                parts[entry["name"], role] = content[record["offset"] :][: record["bytes"]]
    name, role = chance.choice(list(parts))
    entry = next(entry for entry in fields["tensors"] if entry["name"] == name)
    if kind == "part":
        change = chance.choice(("flip", "cut", "extend", "splice", "overwrite", "header"))
        parts[name, role] = damage(parts[name, role], change, chance, content) or b"\0"
        if chance.random() < 0.3:
            entry[role]["codec"] = chance.choice(CODECS)
    elif kind == "rans table":
        entry[role]["codec"] = "rans"
        table = bytearray(parts[name, role])
        for _ in range(chance.choice((1, 1, 2, 5))):
            place = chance.randrange(min(len(table), 60))
            table[place] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        parts[name, role] = bytes(table)
    elif kind == "order":
        reorder(fields["tensors"], chance)
    elif kind == "bomb":
        which = chance.choice(BOMBS)
        entry[role]["codec"] = which.split()[0]
        parts[name, role] = bomb(which)
        if chance.random() < 0.75:
            entry["shape"] = chance.choice(([1024, 1024], [2**20], [2**14, 2**14], [1, 2**22]))
    changed = edit(fields, chance) if kind == "field" or chance.random() < 0.1 else ""
    return rebuild(fields, parts, changed)


def edit(fields: dict[str, Any], chance: random.Random) -> str:
    """Change, remove or add one field anywhere; its name comes back."""
    spots: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            spots.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(fields)
    holder, key = chance.choice(spots)
    action = chance.choice(("set", "set", "set", "near", "remove", "add"))
    if action == "near" and isinstance(holder[key], int):
        holder[key] += chance.choice((-8, -1, 1, 8))
    elif action == "remove":
        del holder[key]
    elif action == "add" and isinstance(holder, dict):
        holder[chance.choice(("extra", "pickle", "values", "scales", "bits"))] = chance.choice(HOSTILE)
    else:
        holder[key] = chance.choice(HOSTILE)
    return str(key)


def reorder(entries: list[dict[str, Any]], chance: random.Random) -> None:
    """Tensors moved, left out, there twice, under another's name, or thousands of them."""
    action = chance.choice((*("shuffle", "remove", "double", "rename") * 4, "many"))
    entry = chance.choice(entries)
    if action == "shuffle":
        chance.shuffle(entries)
    elif action == "remove":
        entries.remove(entry)
    elif action == "double":
        entries.append(json.loads(json.dumps(entry)))
    elif action == "rename":
        entry["name"] = chance.choice(entries)["name"]
    else:
        entries.extend([entry] * 2000)


def rebuild(fields: dict[str, Any], parts: dict[tuple[str, str], bytes], changed: str) -> bytes:
    """Header, ledger and parts, with offsets, lengths and hashes as they are now but for the field `changed`."""
    contents, size = [], 0
    for entry in fields["tensors"] if isinstance(fields.get("tensors"), list) else []:
        for role in ("values", "scales"):
            record = entry.get(role) if isinstance(entry, dict) else None
            data = parts.get((str(entry.get("name")), role)) if isinstance(record, dict) else None
            if data is None:
                continue
            sums = {"bytes": len(data), "offset": size, "sha256": hashlib.sha256(data).hexdigest()}
            record.update({key: value for key, value in sums.items() if key != changed})
            contents.append(data)
            size += len(data)
    content = b"".join(contents)
    text = b""
    for _ in range(5):
        file_bytes = HEADER_BYTES + len(text) + len(content)
        code = fields.get("code_bytes")
        total = file_bytes + code if isinstance(code, int) else 0
        for key, value in zip(SUMS, (len(text), len(content), file_bytes, total), strict=True):
            if key != changed:
                fields[key] = value
        text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")
    return with_text(text, content)


def with_text(text: bytes, content: bytes) -> bytes:
    """A file with this ledger, whatever it is, and a header that fits it."""
    return struct.pack("<8sII32s", b"TRIHYBRD", 1, len(text), hashlib.sha256(text).digest()) + text + content


def awkward(text: bytes, chance: random.Random) -> bytes:
    """The same ledger as JSON that is not canonical, or is not JSON."""
    old, new = chance.choice(
        (
            (b'"format":1', b'"format":1.0'),
            (b'"format":1', b'"format":1,"format":1'),
            (b'"format":1', b'"format":true'),
            (b'"code_bytes":1234', b'"code_bytes":NaN'),
            (b'"code_bytes":1234', b'"code_bytes":1e999'),
            (b'"code_bytes":1234', b'"code_bytes":1234 '),
            (b"query", b"\\u0071uery"),
            (b"query", b"qu\xc3\xa9ry"),
            (b"query", b"qu\xffry"),
            (b"0.5", b"0.50"),
            (b"0.5", b"[" * 13 + b"]" * 13),
        )
    )
    return text.replace(old, new)


@functools.cache
def bomb(which: str) -> bytes:
    """A small payload that decodes to a gigabyte or two of zeros; "zstd window" also asks for a window of 1 GiB."""
    block = bytes(2**20)
    if which == "zlib":
        compressor = zlib.compressobj(9)
        first, again = (compressor.compress(block) + compressor.flush(zlib.Z_SYNC_FLUSH) for _ in range(2))
        return first + again * 1024
    if which == "lzma":
        filters = [{"id": lzma.FILTER_LZMA2, "lc": 0, "lp": 0, "pb": 0, "dict_size": 4096}]
        chunk = lzma.compress(bytes(2**21), lzma.FORMAT_RAW, filters=filters)
        end = 6 + int.from_bytes(chunk[3:5], "big") + 1
        # The same chunk again, its state reset but not the dictionary, and without the byte of properties.
        return chunk[:end] + (bytes([0xA0 | chunk[0] & 31]) + chunk[1:5] + chunk[6:end]) * 1024 + b"\0"
    if which.startswith("zstd"):
        # Frames without size; a block of 128 KiB takes three bytes (size, run-length, last) and the byte to repeat.
        window = bytes([(20 if which == "zstd window" else 7) << 3])
        frame = b"\x28\xb5\x2f\xfd\x00" + window
        again = ((2**17 << 3) | 2).to_bytes(3, "little") + b"\0"
        return frame + again * (2**14 - 1) + ((2**17 << 3) | 3).to_bytes(3, "little") + b"\0"
    import brotli

    compressor = brotli.Compressor(quality=1)
    return b"".join(compressor.process(block) for _ in range(1024)) + compressor.finish()
