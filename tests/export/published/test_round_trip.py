"""Synthetic checkpoints of every revision, imported whole, against a direct reading of the published tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import published_checkpoint
import qwen3_reading
from gemma4_reading import Reading
from trihybrid.export.folder.write import export_folder
from trihybrid.export.incoming import import_folder
from trihybrid.mixers.rwkv7 import REVISIONS
from trihybrid.models.checkpoint import load_model
from trihybrid.storage.folder import check_folder
from trihybrid.storage.tensor_files import TensorRange
from trihybrid.testing import relative_error

IDS = [5, 17, 2, 44, 9, 9, 30, 51, 8, 21, 3]


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_qwen3_student_computes_what_its_equations_say(revision: str, tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.qwen3(revision)
    if revision == "hxa07i":
        fields["nope_in_rwkv"] = True
    source = published_checkpoint.write(tmp_path / "published", fields, tensors)
    taken = import_folder(source, tmp_path / "ours")
    assert taken.source == f"{revision} on qwen3"
    model = load_model(tmp_path / "ours")
    expected = qwen3_reading.logits(revision, fields, tensors, IDS)
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
        assert relative_error(logits, expected) < 1e-5
        # With a cache, token by token after a prompt.
        outputs = model(torch.tensor([IDS[:4]]), use_cache=True)
        cache, pieces = outputs.get("cache", outputs.get("past_key_values")), [outputs.logits[0]]
        for token in IDS[4:]:
            outputs = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            pieces.append(outputs.logits[0])
    assert relative_error(torch.cat(pieces), expected) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_experts_come_one_by_one_or_together(packed: bool, tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.qwen3("hxa07d", experts=3)
    stored = published_checkpoint.packed(tensors) if packed else tensors
    source = published_checkpoint.write(tmp_path / "published", fields, stored)
    assert import_folder(source, tmp_path / "ours").source == "hxa07d on qwen3_moe"
    with torch.no_grad():
        logits = load_model(tmp_path / "ours")(torch.tensor([IDS])).logits[0]
    assert relative_error(logits, qwen3_reading.logits("hxa07d", fields, tensors, IDS)) < 1e-5
    del stored[
        "model.layers.1.mlp.experts.down_proj" if packed else "model.layers.1.mlp.experts.2.up_proj.weight"
    ]
    broken = published_checkpoint.write(tmp_path / "broken", fields, stored)
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.experts.(gate_up|down)_proj \[3, .*\] is missing"
    ):
        import_folder(broken, tmp_path / "out")


@pytest.mark.parametrize("revision", ["hxa07a", "hxa07e"])
def test_positions_are_left_out_where_a_configuration_says_so(revision: str, tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.qwen3(revision, nope_in_rwkv=True)
    source = published_checkpoint.write(tmp_path / "published", fields, tensors)
    import_folder(source, tmp_path / "ours")
    expected = qwen3_reading.logits(revision, fields, tensors, IDS)
    turned = qwen3_reading.logits(revision, fields | {"nope_in_rwkv": False}, tensors, IDS)
    with torch.no_grad():
        logits = load_model(tmp_path / "ours")(torch.tensor([IDS])).logits[0]
    assert relative_error(logits, expected) < 1e-5
    assert relative_error(logits, turned) > 1e-3


def ours(name: str) -> str:
    """The published name of a Gemma-4 tensor as a student of ours has it."""
    name = name.replace("model.language_model.", "model.")
    head, place, tail = name.partition(".self_attn.")
    if not place:
        return name
    if tail.startswith("tiny_"):
        return f"{head}.self_attn.tica.{tail.removeprefix('tiny_')}"
    kept = tail.split("_proj")[0] in ("q", "k", "v", "o") or tail in ("q_norm.weight",)
    layer = int(head.split(".")[2])
    return name if layer % 3 != 2 and (kept or tail == "k_norm.weight") else f"{head}.self_attn.rwkv7.{tail}"


def gemma_logits(fields: dict, tensors: dict[str, torch.Tensor], ids: list[int]) -> torch.Tensor:
    """All layers by the formulas, from the published tensors."""
    base = fields["text_config"]
    types = base["layer_types"]
    slots = [
        {"mixers": ["rwkv7", "tica"]} if kind == "full_attention" else {"mixers": ["sliding"]}
        for kind in types
    ]
    p = published_checkpoint
    config = {"base_config": base, "slots": slots, "tica": {"heads": 4, "kv_heads": 2, "head_dim": 8}}
    config["rwkv7"] = {"heads": p.HEADS, "kv_heads": p.KV_HEADS, "head_dim": p.HEAD}
    named = {ours(name): tensor.squeeze() for name, tensor in tensors.items()}
    reading = Reading(named, config, [len(ids)])
    weights, width = reading.weights, base["hidden_size_per_layer_input"]
    h_TD = reading.embedding(ids)
    looked = weights["model.embed_tokens_per_layer.weight"][ids].unflatten(-1, (-1, width)) * width**0.5
    projected = h_TD @ weights["model.per_layer_model_projection.weight"].T * base["hidden_size"] ** -0.5
    norm = weights["model.per_layer_projection_norm.weight"]
    per_layer = (reading.norm(projected.unflatten(-1, (-1, width)), norm) + looked) * 2**-0.5
    for i in range(len(slots)):
        found, _ = reading.layer(i, h_TD, per_layer[:, i])
        h_TD = found["output"]
    return reading.logits(reading.norm(h_TD, weights["model.norm.weight"]))


@pytest.mark.parametrize("files", [1, 3])
def test_the_gemma4_release_computes_what_its_equations_say(files: int, tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.gemma4()
    source = published_checkpoint.write(tmp_path / "published", fields, tensors, files)
    taken = import_folder(source, tmp_path / "ours")
    assert taken.source == "hxa07i on gemma4_text"
    assert taken.notes == (
        "1 tensors left out: never read: the layer shares the keys and values of another",
        "1 tensors left out: of another tower; the student is the text model",
    )
    model = load_model(tmp_path / "ours")
    assert [slot["mixers"] for slot in model.config.slots] == [
        ["sliding"],
        ["sliding"],
        ["rwkv7", "tica"],
    ] * 3
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    assert relative_error(logits, gemma_logits(fields, tensors, IDS)) < 1e-5
    generated = model.generate(torch.tensor([IDS]), max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, len(IDS) + 4)


def test_an_import_is_whole_and_says_where_all_came_from(tmp_path: Path) -> None:
    fields, tensors = published_checkpoint.qwen3("hxa07b")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    source = published_checkpoint.write(tmp_path / "published", fields, tensors)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    (source / "modeling_rwkv07bqwen3.py").write_text("raise SystemExit\n")
    import_folder(source, tmp_path / "ours")
    config = check_folder(tmp_path / "ours")
    assert (config["model_type"], config["dtype"]) == ("trihybrid_qwen3", "bfloat16")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "config.json", "generation_config.json", "import.json", "model.safetensors", "trihybrid.json",
    ]  # fmt: skip
    report = json.loads((tmp_path / "ours" / "import.json").read_text())
    assert (report["revision"], report["teacher"], report["source"]) == ("hxa07b", "qwen3", "published")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.bfloat16 and model.generation_config.temperature == 0.6
    named = model.state_dict()
    assert set(report["tensors"]) == set(named)
    for name, place in report["tensors"].items():
        given = tensors[place["from"][0]]
        assert torch.equal(named[name], given.squeeze() if place["change"] == "reshape" else given)
    assert set(report["left"]) == set(tensors) - {place["from"][0] for place in report["tensors"].values()}
    assert set(report["left"].values()) == {"declared and not used by hxa07b"}


def test_weights_are_written_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tensors only those are in memory that have to be turned round."""
    fields, tensors = published_checkpoint.qwen3("hxa079")
    source = published_checkpoint.write(tmp_path / "published", fields, tensors)
    read: list[tuple[int, ...]] = []
    plain = TensorRange.read
    monkeypatch.setattr(TensorRange, "read", lambda self: read.append(self.shape) or plain(self))
    import_folder(source, tmp_path / "ours")
    places = json.loads((tmp_path / "ours" / "import.json").read_text())["tensors"].values()
    turned = [place["from"][0] for place in places if place["change"] == "transpose"]
    assert sorted(read) == sorted(tuple(tensors[name].shape) for name in turned)
    assert len(turned) < len(tensors) / 2
    assert [path.name for path in (tmp_path / "ours").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.long
def test_an_imported_student_is_exported_like_any_other(
    bare_python: Callable[..., dict], tmp_path: Path
) -> None:
    """A Qwen3 host with positions, residuals and a bonus in its recurrences, where there is no trihybrid."""
    fields, tensors = published_checkpoint.qwen3("hxa079")
    import_folder(published_checkpoint.write(tmp_path / "published", fields, tensors), tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "exported")
    found = bare_python(
        "import json, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "with torch.no_grad():\n"
        "    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0].tolist()\n"
        "print(json.dumps({'logits': logits, 'module': type(model).__module__}))",
        tmp_path / "exported",
        json.dumps(IDS),
    )
    assert found["module"].endswith(".modeling_trihybrid_qwen3")
    with torch.no_grad():
        logits = load_model(tmp_path / "ours")(torch.tensor([IDS])).logits[0]
    assert torch.equal(torch.tensor(found["logits"]), logits)
    assert "Read from published, revision hxa079." in (tmp_path / "exported" / "README.md").read_text()
