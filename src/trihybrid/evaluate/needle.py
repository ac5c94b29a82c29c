"""Retrieval of a needle from contexts of several lengths, as multiples of the length that a model was trained on."""

from torch import nn

from trihybrid.data import PreparedData, encode_probe
from trihybrid.data.needle import needle_documents
from trihybrid.evaluate.recall import recall
from trihybrid.evaluate.section import NeedleSection


def needle(model: nn.Module, data: PreparedData, section: NeedleSection) -> list[dict[str, int | float]]:
    """Accuracy of the argmax at the planted values, for each length: [{length, accuracy, count}].

    The haystack is the validation text. A document has about `length` tokens: its characters follow from the mean
    length of a token in that text. ValueError for a tokenizer for which a value is not one token.
    """
    text = "\n".join(data.validation_documents)[: section.measured_characters]
    characters = len(text) / len(data.tokenizer.encode(text))
    rows: list[dict[str, int | float]] = []
    for length in section.lengths:
        documents = needle_documents(
            section.documents,
            max(64, round(length * characters)),
            data.validation_documents,
            section.pairs,
            section.values,
            section.joiner,
            section.seed,
        )
        longest = max(len(data.tokenizer.encode(document.text)) for document in documents)
        found = recall(model, encode_probe(documents, data.tokenizer, longest + 1), None, section.batch_size)
        count = sum(int(bucket["count"]) for bucket in found.by_distance)
        rows.append({"length": length, "accuracy": found.overall, "count": count})
    return rows
