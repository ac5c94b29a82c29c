"""What the tests of this room share: a tiny SentencePiece model with the challenge's settings."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def train(file: Path, **changes: object) -> Path:
    """Train on generated words and write the model."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    generator = np.random.Generator(np.random.Philox(key=0))
    syllables = ["ba", "de", "ki", "lo", "mu", "r\u00e9", "sta", "tre", "\u4e2d\u6587", "12", "7"]
    words = ["".join(generator.choice(syllables, size=generator.integers(1, 4))) for _ in range(200)]
    sentences = [" ".join(generator.choice(words, size=12)) + "." for _ in range(300)]
    settings: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 384,
        "character_coverage": 0.999,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "nmt_nfkc",
        "add_dummy_prefix": False,
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "hard_vocab_limit": False,
        "num_threads": 1,
        "minloglevel": 2,
    }
    output = io.BytesIO()
    trainer.train(sentence_iterator=iter(sentences), model_writer=output, **(settings | changes))
    file.write_bytes(output.getvalue())
    return file


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., Path]:
    """Trains a tiny model: (file, **settings of the trainer to change) -> file."""
    return train


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the tiny model."""
    return train(tmp_path_factory.mktemp("sentencepiece") / "tiny.model")
