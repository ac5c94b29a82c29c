"""Converting one folder into another: the surgery alone, without distillation."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trihybrid.data import Tokenizer, carry_tokenizer, read_documents
from trihybrid.models.checkpoint import open_teacher
from trihybrid.storage.hub import find_model
from trihybrid.surgery.card import CARD, student_card
from trihybrid.surgery.plan import check_plan, make_plan
from trihybrid.surgery.section import SurgerySection
from trihybrid.surgery.slots import Block
from trihybrid.surgery.stream import stream_student
from trihybrid.surgery.tensors import TensorReport

ROW, ROWS = 256, 8
"""Tokens of a row of calibration text, and rows of a block. A block is one pass over a teacher's weights, and needs its
activations; 2,048 tokens of E2B's widest layer are 100 MB in float32."""


def convert_folder(
    teacher: str,
    out: Path,
    section: SurgerySection | None,
    plan_file: Path | None,
    text: str,
    towers: bool = True,
    revision: str | None = None,
) -> tuple[dict[str, Any], TensorReport]:
    """Write the student of a teacher to `out`.

    Args:
        teacher: folder, or the hub's name of a model.
        out: a folder that does not exist yet.
        section: what to do; or
        plan_file: a saved plan that says it.
        text: where calibration tokens come from, if the plan wants some.
        towers: carry a multimodal teacher's towers along.
        revision: of a model on the hub.

    Returns:
        The plan, and what became of every tensor.

    Raises:
        ValueError: `out` exists; a teacher, plan or text that does not serve; a full disk. Nothing is written then.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; name a folder that does not exist yet")
    plan = None if plan_file is None else _read_json(plan_file)
    published = open_teacher(find_model(teacher, revision))
    if plan is None:
        assert section is not None
        plan = make_plan(published.base, section, teacher)
    section = check_plan(plan, published.base)
    tokens: list[Block] = []
    if section.calibration_tokens:
        tokenizer = Tokenizer.from_file(published.folder)
        tokens = text_blocks(read_documents(text), tokenizer, section.calibration_tokens)

    def tokenizer_files(partial: Path) -> None:
        bos = carry_tokenizer(published.folder, partial)
        if bos is not None:
            check_bos(partial, bos)

    def card(partial: Path, report: TensorReport) -> None:
        (partial / CARD).write_text(student_card(plan, report, out.name), encoding="utf-8")

    return plan, stream_student(
        published, plan, out, tokens, towers=towers, beside=tokenizer_files, finish=card
    )


def text_blocks(documents: list[str], tokenizer: Tokenizer, tokens: int) -> list[Block]:
    """The beginnings of documents, each with a BOS and at most `ROW` tokens, packed into rows of `ROW` tokens: at most
    `tokens` of them, in whole rows, or in one shorter row where the text is short. `ROWS` rows are a block."""
    ids: list[int] = []
    positions: list[int] = []
    for document in documents:
        beginning = [tokenizer.bos_id, *tokenizer.encode(document)[: ROW - 1]]
        ids += beginning
        positions += range(len(beginning))
        if len(ids) >= tokens:
            break
    length = min(ROW, len(ids))
    count = max(1, min(tokens, len(ids)) // length) * length
    # What a row cuts off goes on in the next one as a document of its own.
    rows_BT = torch.tensor(ids[:count]).view(-1, length)
    places_BT = torch.tensor(positions[:count]).view(-1, length)
    first_BT = torch.arange(length).expand_as(places_BT)
    before_BT = (places_BT == 0).cumsum(1) == 0
    positions_BT = torch.where(before_BT, first_BT, places_BT)
    return list(zip(rows_BT.split(ROWS), positions_BT.split(ROWS), strict=True))


def check_bos(folder: Path, bos: str) -> None:
    """Refuse a tokenizer that does not begin a text with BOS, once, as transformers loads it.

    Raises:
        ValueError: it does not.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    found = tokenizer.convert_ids_to_tokens(tokenizer("a").input_ids)
    if found[:1] != [bos] or bos in found[1:]:
        raise ValueError(
            f'the tokenizer makes {found} of "a", which must begin with one {bos}; set add_bos_token in the teacher\'s '
            "tokenizer_config.json"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such plan file; make one with `trihybrid plan --save`") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
