"""One row of results: equal to the single measurements, in one pass."""

import json
import math

import pytest
import yaml
from pydantic import ValidationError

from trihybrid.data import sequential
from trihybrid.evaluate import (
    EvaluationSection,
    agreement,
    bits_per_byte,
    evaluate,
    loss_by_position,
    position_edges,
    recall,
    validation_piece,
)

KEYS = [
    "bpb",
    "raw_bpb",
    "kl",
    "agreement",
    "entropy",
    "calibration_error",
    "recall",
    "recall_overall",
    "recall_by_distance",
    "loss_by_position",
]


@pytest.mark.parametrize("limit", [None, 100])
def test_row_equals_the_single_measurements(bigram, prepared, limit) -> None:
    section = EvaluationSection(sequence_length=32, batch_size=4, validation_tokens=limit, position_buckets=4)
    student, teacher = bigram(1), bigram(2)
    row = evaluate(student, teacher, prepared, section, window=16)
    assert list(row) == KEYS
    assert json.loads(json.dumps(row, allow_nan=False)) == row

    piece = validation_piece(prepared, limit)

    def batches():
        return sequential(prepared.validation, 32, 4, limit=piece.tokens)

    bits = bits_per_byte(student, batches(), piece.decoded_bytes, piece.raw_bytes)
    both = agreement(student, teacher, batches())
    remembered = recall(student, prepared.recall, 16, 4)
    assert (row["bpb"], row["raw_bpb"]) == (bits.decoded, bits.raw)
    assert (row["kl"], row["agreement"]) == (both.kl, both.top1)
    assert (row["recall"], row["recall_overall"]) == (remembered.beyond, remembered.overall)
    assert row["recall_by_distance"] == remembered.by_distance
    assert row["loss_by_position"] == loss_by_position(student, batches(), position_edges(32, 4))
    assert sum(bucket["count"] for bucket in row["loss_by_position"]) == bits.tokens


def test_one_forward_a_batch(bigram, prepared) -> None:
    section = EvaluationSection(sequence_length=32, batch_size=4)
    student, teacher = bigram(1), bigram(2)
    evaluate(student, teacher, prepared, section, window=16)
    batches = sum(1 for _ in sequential(prepared.validation, 32, 4))
    assert teacher.calls == batches
    assert student.calls == batches + math.ceil(6 / 4)


@pytest.mark.parametrize(("given_teacher", "wanted"), [(False, (None, None)), (True, (0.0, 1.0))])
def test_the_teacher_itself_and_a_model_without_one(bigram, prepared, given_teacher, wanted) -> None:
    teacher = bigram(2)
    section = EvaluationSection(sequence_length=32, batch_size=4)
    row = evaluate(teacher, teacher if given_teacher else None, prepared, section, window=None)
    assert (row["kl"], row["agreement"], row["recall"]) == (*wanted, None)
    assert teacher.calls == sum(1 for _ in sequential(prepared.validation, 32, 4)) + 2


def test_uniform_model_on_bytes(uniform, prepared) -> None:
    row = evaluate(uniform, None, prepared, EvaluationSection(sequence_length=32), window=16)
    assert row["bpb"] == row["raw_bpb"] == pytest.approx(math.log2(260), rel=1e-6)
    assert all(bucket["loss"] == pytest.approx(math.log(260), rel=1e-6) for bucket in row["loss_by_position"])


def test_recall_documents_are_limited(uniform, prepared) -> None:
    section = EvaluationSection(sequence_length=32, recall_documents=2)
    row = evaluate(uniform, None, prepared, section, window=16)
    assert sum(bucket["count"] for bucket in row["recall_by_distance"]) == 2 * 8 * 2


def test_section_is_bounded() -> None:
    assert EvaluationSection.model_validate(yaml.safe_load("{batch_size: 2}")).batch_size == 2
    for bad in ("{batch_size: 0}", "{sequence_length: 1}", "{validation_tokens: 1}", "{recall_documents: 0}"):
        with pytest.raises(ValidationError):
            EvaluationSection.model_validate(yaml.safe_load(bad))
    with pytest.raises(ValidationError, match="window"):
        EvaluationSection.model_validate({"window": 3})
