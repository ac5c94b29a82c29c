"""All measurements of one model, as one row of results."""

from torch import nn

from trihybrid.data import PreparedData, RecallSet, sequential
from trihybrid.evaluate.agreement import AgreementMeter
from trihybrid.evaluate.bpb import BitsPerByteMeter
from trihybrid.evaluate.calibration import CalibrationMeter
from trihybrid.evaluate.needle import needle
from trihybrid.evaluate.position import PositionMeter, position_edges
from trihybrid.evaluate.recall import recall
from trihybrid.evaluate.scoring import Meter, score
from trihybrid.evaluate.section import EvaluationSection
from trihybrid.evaluate.validation import validation_piece


def evaluate(
    model: nn.Module,
    teacher: nn.Module | None,
    data: PreparedData,
    section: EvaluationSection,
    window: int | None,
) -> dict[str, object]:
    """Measure a causal language model (see `scoring.score` for its interface) and return one row, ready for JSON.

    bpb, raw_bpb: bits a byte of the decoded tokens and of the original text. kl: forward KL(teacher || model), nats a
    token, and agreement: fraction of equal first choices; None without a teacher, 0.0 and 1.0 for the teacher itself.
    entropy: of its predictions, nats a token; calibration_error: expected calibration error in [0, 1].
    recall: accuracy at distances of `window` tokens or more (None without a window), recall_overall: at all.
    recall_by_distance: list of {low, high, accuracy, count}. loss_by_position: list of {position, loss, count}.
    needle: list of {length, accuracy, count}, where the section asks for it.

    The validation text is read once, model and teacher together. ValueError for what its parts refuse: no answer
    beyond the window, vocabularies that differ, no text within validation_tokens, a loss that is not finite.
    """
    compared = None if teacher is model else teacher
    piece = validation_piece(data, section.validation_tokens)
    bits = BitsPerByteMeter(piece.decoded_bytes, piece.raw_bytes)
    positions = PositionMeter(position_edges(section.sequence_length, section.position_buckets))
    agreement = AgreementMeter()
    calibration = CalibrationMeter()
    meters: list[Meter] = [bits, positions, calibration]
    if compared is not None:
        meters.append(agreement)
    # Recall is short and is the part that a recipe may have set wrongly: it goes first.
    remembered = recall(model, _first(data.recall, section.recall_documents), window, section.batch_size)
    retrieved = None if section.needle is None else needle(model, data, section.needle)
    batches = sequential(data.validation, section.sequence_length, section.batch_size, limit=piece.tokens)
    score(model, batches, meters, teacher=compared)
    # The bytes were counted for exactly these tokens: all but the BOS of each document.
    assert bits.tokens == piece.tokens - piece.documents
    per_byte = bits.result()
    kl, same = (None, None) if teacher is None else (0.0, 1.0)
    if compared is not None:
        kl, same = agreement.result().kl, agreement.result().top1
    return {
        "bpb": per_byte.decoded,
        "raw_bpb": per_byte.raw,
        "kl": kl,
        "agreement": same,
        "entropy": calibration.result().entropy,
        "calibration_error": calibration.result().error,
        "recall": remembered.beyond,
        "recall_overall": remembered.overall,
        "recall_by_distance": remembered.by_distance,
        "loss_by_position": positions.result(),
        **({} if retrieved is None else {"needle": retrieved}),
    }


def _first(recall_set: RecallSet, documents: int | None) -> RecallSet:
    return RecallSet(
        recall_set.tokens_NT[:documents], recall_set.answer_NT[:documents], recall_set.distance_NT[:documents]
    )
