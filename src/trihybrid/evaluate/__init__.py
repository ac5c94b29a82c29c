"""What a causal language model is worth: bits per byte, agreement with a teacher, recall, loss by position.

`evaluate` measures all in one pass and returns a row of results; each measurement is a function of its own too.
"""

from trihybrid.evaluate.agreement import Agreement, agreement
from trihybrid.evaluate.bpb import BitsPerByte, bits_per_byte
from trihybrid.evaluate.position import loss_by_position, position_edges
from trihybrid.evaluate.recall import Recall, distance_edges, recall
from trihybrid.evaluate.section import EvaluationSection
from trihybrid.evaluate.suite import evaluate
from trihybrid.evaluate.validation import ValidationPiece, validation_piece

__all__ = [
    "Agreement",
    "BitsPerByte",
    "EvaluationSection",
    "Recall",
    "ValidationPiece",
    "agreement",
    "bits_per_byte",
    "distance_edges",
    "evaluate",
    "loss_by_position",
    "position_edges",
    "recall",
    "validation_piece",
]
