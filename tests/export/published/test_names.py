"""Spellings of names, and what a folder that does not fit is told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import published_checkpoint
from trihybrid.export.incoming import import_folder
from trihybrid.models.checkpoint import load_model

Tensors = dict[str, torch.Tensor]
RAW = ("w1", "w2", "a1", "a2", "g1", "g2", "tiny_g1", "tiny_g2")


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def ends(old: str, new: str) -> Callable[[str], str]:
    return lambda name: name.removesuffix(old) + new if name.endswith(f".{old}") else name


def spelt(style: str) -> Callable[[Tensors], Tensors]:
    """The recurrences' four projections under other names; `{}` stands for ours."""
    letters = {"receptance": "q", "key": "k", "value": "v", "output": "o"}

    def change(name: str) -> str:
        for word, letter in letters.items():
            if f".self_attn.{word}.weight" in name:
                return name.replace(f"{word}.weight", f"{style.format(word, letter=letter)}.weight")
        return name

    return renamed(change)


def as_linear(tensors: Tensors) -> Tensors:
    """LoRA matrices as the weights of linear layers, (out, in)."""
    return {
        f"{name}.weight" if name.rsplit(".", 1)[-1] in RAW else name: (
            tensor.T if name.rsplit(".", 1)[-1] in RAW else tensor
        )
        for name, tensor in tensors.items()
    }


SPELLINGS = {
    "as published": lambda tensors: tensors,
    "with _proj": spelt("{}_proj"),
    "as the teacher's": spelt("{letter}_proj"),
    "of a training run": renamed(
        lambda name: name.replace(".self_attn.", ".self_attn.student_attn.").replace("model.", "model.model.", 1)
    ),
    "of a text model": renamed(lambda name: name.replace("model.language_model.", "model.")),
    "of an older multimodal model": renamed(
        lambda name: name.replace("model.language_model.", "language_model.model.")
    ),
    "with linear LoRAs": as_linear,
    "squeezed": lambda tensors: {
        name: tensor.squeeze() if name.endswith(("w0", "a0")) else tensor for name, tensor in tensors.items()
    },
    "TICA spelt out": renamed(lambda name: name.replace("tiny_", "tiny_attention.")),
    "receptance by its shape": renamed(ends("receptance.weight", "recv.weight")),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The weights of the release as published, imported."""
    root = tmp_path_factory.mktemp("plain")
    import_folder(published_checkpoint.write(root / "in", *published_checkpoint.gemma4()), root / "out")
    return load_model(root / "out").state_dict()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model(spelling: str, plain: Tensors, tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.gemma4()
    source = published_checkpoint.write(tmp_path / "in", fields, SPELLINGS[spelling](tensors))
    taken = import_folder(source, tmp_path / "out")
    found = load_model(tmp_path / "out").state_dict()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    by_shape = [note for note in taken.notes if "by its shape alone" in note]
    assert bool(by_shape) == (spelling == "receptance by its shape")
    if by_shape:
        assert (
            by_shape[0]
            == "layer 2: recv.weight is read as rwkv7.receptance.weight: by its shape alone, [24, 32]"
        )


def test_what_training_left_in_a_recurrent_layer_is_not_read(tmp_path: Path) -> None:
    """The teacher's projections beside the recurrence's, and metadata; each is listed with its reason."""
    fields, tensors = published_checkpoint.qwen3("hxa07c")
    layer = "model.layers.0.self_attn."
    kept = {
        f"{layer}{name}.weight": torch.randn(4, 4)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm")
    }
    kept |= {
        f"{layer}layer_architecture": torch.zeros(1, dtype=torch.int64),
        f"{layer}head_size_record": torch.full((1,), 6.0),
    }
    source = published_checkpoint.write(tmp_path / "in", fields, tensors | kept)
    import_folder(source, tmp_path / "out")
    left = json.loads((tmp_path / "out" / "import.json").read_text())["left"]
    for name in kept:
        assert left[name] in ("the teacher's own, beside the recurrence's", "what training noted")


def drop(*suffixes: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(suffixes)}


def put(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape)}


A = "model.layers.0.self_attn."
B = "model.layers.1.self_attn."
FAULTS = [
    (drop("layers.1.self_attn.w0"), "layer 1: w0 is missing (also looked for: w0.weight)"),
    (
        drop("layers.1.self_attn.key.weight"),
        "layer 1: key.weight is missing (also looked for: key_proj.weight, k_proj.weight)",
    ),
    (
        drop("layers.0.self_attn.k_norm.weight"),
        "1 tensors do not fit hxa079: layer 0: rwkv7.k_norm.weight: wanted [6], not found",
    ),
    (
        put(f"{B}a2", 4, 23),
        "1 tensors do not fit hxa079: layer 1: rwkv7.a2: wanted [4, 24], found a2 [4, 23]",
    ),
    (put(f"{B}mystery", 3), "layer 1: mystery [3] belongs to nothing in hxa079"),
    (put("model.extra.weight", 3), "model.extra.weight [3] belongs to nothing"),
    (drop("layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight [20, 16] is missing"),
    (put("model.norm.weight", 15), "model.norm.weight: wanted [16], found [15]"),
    (drop("lm_head.weight"), "lm_head.weight [53, 16] is missing"),
    (put(f"{A}value.weight", 24, 16), "layer 0: rwkv7.value.weight: wanted [12, 16], found value.weight [24, 16]"),
    (
        lambda t: put(f"{B}g1", 16, 9)(put(f"{B}g2", 9, 24)(t)),
        "1 tensors do not fit hxa079: layer 1: rwkv7.gate_rank is 9, layer 0 has 5",
    ),
    (
        lambda t: put(f"{B}x.weight", 24, 16)(put(f"{B}y.weight", 24, 16)(drop("1.self_attn.receptance.weight")(t))),
        "rwkv7.receptance.weight: wanted [24, 16], not found; of this shape are x.weight, y.weight",
    ),
    (
        lambda t: {n.replace("layers.3.", "layers.7."): v for n, v in t.items()},
        "tensors of layers 0 to 7 (4), recurrences in 0 to 7 (3), and config.json says 4 layers",
    ),
    (
        lambda t: {n: v for n, v in t.items() if "layers.3.self_attn" not in n},
        "layers [3] are not in transformer_layers, but have no tensors of a recurrence",
    ),
    (
        lambda t: t | {"model.model.norm.weight": t["model.norm.weight"].clone()},
        "are two spellings of one tensor; keep one of them",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), FAULTS)
def test_what_does_not_fit_is_said_and_nothing_is_written(
    damage: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    fields, tensors = published_checkpoint.qwen3("hxa079")
    source = published_checkpoint.write(tmp_path / "in", fields, damage(tensors))
    with pytest.raises(ValueError) as refusal:
        import_folder(source, tmp_path / "out")
    assert message in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("damage", "listed", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if not ("layers.5." in n and "tiny_" in n)},
            [2, 5, 8],
            "layer 5: tiny_attention_layers lists it, but it has no tensors of TICA",
        ),
        (lambda t: t, [2, 5], "layer 8: has tensors of TICA, but tiny_attention_layers does not list it"),
        (
            drop("5.self_attn.tiny_o_proj.weight"),
            [2, 5, 8],
            "layer 5: tica.o_proj.weight: wanted [32, 32], not found",
        ),
    ],
)
def test_tica_stands_where_it_is_said_to(
    damage: Callable[[Tensors], Tensors], listed: list[int], message: str, tmp_path: Path
) -> None:
    fields, tensors = published_checkpoint.gemma4(tiny_attention_layers=listed)
    source = published_checkpoint.write(tmp_path / "in", fields, damage(tensors))
    with pytest.raises(ValueError) as refusal:
        import_folder(source, tmp_path / "out")
    assert message in str(refusal.value)


def test_mixed_dtypes_are_noted(tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.qwen3("hxa07a")
    tensors = {n: t if n.endswith("w0") else t.bfloat16() for n, t in tensors.items()}
    taken = import_folder(published_checkpoint.write(tmp_path / "in", fields, tensors), tmp_path / "out")
    assert taken.notes[0].startswith("weights are stored in BF16, F32; transformers loads all in one of them")


def test_a_square_matrix_of_a_linear_layer_could_be_either_way_round(tmp_path: Path) -> None:
    """w2 with as many rows as columns under a linear layer's name is refused; under its raw name it is (in, out)."""
    fields, tensors = published_checkpoint.qwen3("hxa07a")
    square = {}
    for i in (0, 1, 3):
        layer = f"model.layers.{i}.self_attn."
        square |= {f"{layer}w1": torch.randn(16, 24), f"{layer}w2": torch.randn(24, 24)}
    raw = published_checkpoint.write(tmp_path / "raw", fields, tensors | square)
    import_folder(raw, tmp_path / "out")
    assert torch.equal(
        load_model(tmp_path / "out").model.layers[0].self_attn.rwkv7.w2, square["model.layers.0.self_attn.w2"]
    )
    linear = {name: t for name, t in (tensors | square).items() if not name.endswith(("w1", "w2"))}
    linear |= {f"{name}.weight": t.T for name, t in square.items()}
    with pytest.raises(ValueError, match=r"layer 0: rwkv7.w2: wanted \[24, 24\], found w2.weight \[24, 24\]"):
        import_folder(published_checkpoint.write(tmp_path / "linear", fields, linear), tmp_path / "out2")


def test_a_head_that_is_called_tied_must_be_the_embedding(tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.qwen3("hxa07a", tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens"
    ):
        import_folder(published_checkpoint.write(tmp_path / "in", fields, tensors), tmp_path / "out")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    taken = import_folder(published_checkpoint.write(tmp_path / "in", fields, tensors), tmp_path / "out")
    assert taken.notes == ("1 tensors left out: tied to the embedding, and equal to it",)


def test_quantised_weights_and_teachers_are_refused(tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.qwen3("hxa07a")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(20, 16, dtype=torch.int8)
    source = published_checkpoint.write(tmp_path / "in", fields, tensors)
    with pytest.raises(
        ValueError, match=r"1 tensors are no floats, first model.layers.0.mlp.up_proj.weight \(I8\)"
    ):
        import_folder(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(fields | {"model_type": "qwen3"}))
    with pytest.raises(ValueError, match=r'model_type is "qwen3", a teacher; it needs no import'):
        import_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
