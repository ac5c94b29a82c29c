"""Written vectors against formulas written out again, to the last tensor, and what the manifest promises about them."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hxa07
import published_checkpoint
import qwen3_reading
from gemma4_reading import Reading
from small_student import make_student
from tiny_gemma4 import build_teacher
from trihybrid.export.incoming import import_folder
from trihybrid.export.vectors.record import WHAT, describe
from trihybrid.export.vectors.write import MANIFEST, write_vectors
from trihybrid.storage.folder import save_folder
from trihybrid.testing import relative_error

PROMPT, STEPS = 9, 3


@pytest.fixture(scope="module", params=["student", "teacher"])
def vectors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of a model, and of its vectors; the prompt is longer than the window."""
    root = tmp_path_factory.mktemp(request.param)
    model = make_student() if request.param == "student" else build_teacher()
    save_folder(root / "model", model.save_pretrained)
    write_vectors(root / "model", root / "vectors", PROMPT, STEPS, seed=5)
    return root / "model", root / "vectors"


def test_formulas_written_out_again_give_every_tensor(vectors: tuple[Path, Path]) -> None:
    """Each layer on its own recorded input. All tensors of the manifest are met, none is left out."""
    model, folder = vectors
    manifest = json.loads((folder / MANIFEST).read_text())
    steps = [load_file(folder / step["file"]) for step in manifest["steps"]]
    sizes = [len(step["tokens"]) for step in manifest["steps"]]
    config = json.loads((model / "config.json").read_text())
    reading = Reading(load_file(model / "model.safetensors"), config, sizes)

    def whole(name: str) -> torch.Tensor:
        return torch.cat([step[name] for step in steps], 1)[0].double()

    expected: list[dict[str, torch.Tensor]] = [{} for _ in steps]

    def tokens_of(name: str, value_T: torch.Tensor) -> None:
        for step, part in zip(expected, value_T.split(sizes), strict=True):
            step[name] = part[None]

    tokens_of("embedding", reading.embedding(manifest["tokens"]))
    stream = whole("embedding")
    for i in range(len(reading.slots)):
        prefix = f"layers.{i}."
        tokens_of(f"{prefix}input", stream)
        per_layer = whole(f"{prefix}per_layer_input")
        tokens_of(f"{prefix}per_layer_input", per_layer)
        found, states = reading.layer(i, whole(f"{prefix}input"), per_layer)
        for name, value in found.items():
            tokens_of(prefix + name, value)
        before = {
            name: torch.zeros_like(t) if name == "matrix" else t[:, :0] for name, t in states[0].items()
        }
        for step, after in zip(expected, states, strict=True):
            step |= {f"{prefix}state.{name}.before": t[None] for name, t in before.items()}
            step |= {f"{prefix}state.{name}.after": t[None] for name, t in after.items()}
            before = after
        stream = whole(f"{prefix}output")
    normed = reading.norm(stream, reading.weights["model.norm.weight"])
    tokens_of("final_norm", normed)
    tokens_of("logits", reading.logits(whole("final_norm")))
    largest = manifest["tolerance"]["largest"]
    assert largest == 1e-5
    for step, given, wanted in zip(manifest["steps"], steps, expected, strict=True):
        assert set(wanted) == set(given) == set(step["tensors"])
        for name, tensor in given.items():
            error = relative_error(tensor, wanted[name])
            assert error <= largest, (step["name"], name, error)


def test_per_layer_inputs_are_the_models(vectors: tuple[Path, Path]) -> None:
    """ple = (norm(W e / sqrt(D)) + E_p[ids] sqrt(P)) / sqrt(2), a slice a layer."""
    model, folder = vectors
    manifest = json.loads((folder / MANIFEST).read_text())
    config = json.loads((model / "config.json").read_text())
    reading = Reading(load_file(model / "model.safetensors"), config, [PROMPT])
    width, layers = reading.base["hidden_size_per_layer_input"], reading.base["num_hidden_layers"]
    prefill = load_file(folder / "prefill.safetensors")
    weights, tokens = reading.weights, manifest["steps"][0]["tokens"]
    looked = weights["model.embed_tokens_per_layer.weight"][tokens] * width**0.5
    projected = prefill["embedding"][0].double() @ weights["model.per_layer_model_projection.weight"].T
    projected = (projected * reading.base["hidden_size"] ** -0.5).view(PROMPT, layers, width)
    normed = reading.norm(projected, weights["model.per_layer_projection_norm.weight"])
    expected = (normed + looked.view(PROMPT, layers, width)) * 2**-0.5
    for i in range(layers):
        assert relative_error(prefill[f"layers.{i}.per_layer_input"][0], expected[:, i]) < 1e-5


def test_a_published_student_on_another_host_is_recorded_too(tmp_path: Path) -> None:
    """hxa079 on Qwen3: logits and the state of a recurrence that mixes the first one's keys and values in."""
    fields, tensors = published_checkpoint.qwen3("hxa079")
    import_folder(published_checkpoint.write(tmp_path / "in", fields, tensors), tmp_path / "model")
    manifest = write_vectors(tmp_path / "model", tmp_path / "vectors", 6, 2)
    steps = [load_file(tmp_path / "vectors" / step["file"]) for step in manifest["steps"]]
    expected = qwen3_reading.logits("hxa079", fields, tensors, manifest["tokens"])
    assert relative_error(torch.cat([step["logits"][0] for step in steps]), expected) < 1e-5

    def mixed(layer: int, first: list | None) -> tuple[torch.Tensor, torch.Tensor, list]:
        prefix = f"model.layers.{layer}.self_attn."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        x_TD = torch.cat([step[f"layers.{layer}.mixer.input"][0] for step in steps])
        return hxa07.time_mix("hxa079", own, x_TD, hxa07.Sizes(4, 2, 6, fields["rope_theta"]), first)

    pairs = mixed(0, None)[2]
    y_TD, states, _ = mixed(3, pairs)
    recorded = torch.cat([step["layers.3.rwkv7.output"][0] for step in steps])
    assert relative_error(recorded, y_TD) < 1e-5
    assert relative_error(steps[-1]["layers.3.state.matrix.after"][0], states) < 1e-5
    assert {name for name in steps[0] if "per_layer" in name} == set()


def test_the_manifest_says_what_the_files_hold(vectors: tuple[Path, Path]) -> None:
    _, folder = vectors
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [step["name"] for step in manifest["steps"]] == ["prefill", "decode-1", "decode-2", "decode-3"]
    assert [len(step["tokens"]) for step in manifest["steps"]] == [PROMPT, 1, 1, 1]
    assert [token for step in manifest["steps"] for token in step["tokens"]] == manifest["tokens"]
    positions = [place for step in manifest["steps"] for place in step["positions"]]
    assert positions == list(range(PROMPT + STEPS))
    assert manifest["seed"] == 5 and manifest["dtype"] == "float32"
    letters = set()
    for step in manifest["steps"]:
        assert step["sha256"] == hashlib.sha256((folder / step["file"]).read_bytes()).hexdigest()
        for name, tensor in load_file(folder / step["file"]).items():
            entry = step["tensors"][name]
            assert entry["shape"] == list(tensor.shape) and entry["dtype"] == "float32"
            assert len(entry["axes"].split()) == tensor.dim()
            assert entry["sha256"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            assert entry["what"]
            letters |= set(entry["axes"].split())
    assert letters <= set(manifest["legend"])


def test_equal_seeds_give_equal_files(student: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_vectors(student, tmp_path / name, 4, 1, seed)
    first, again, other = ((tmp_path / name / "prefill.safetensors").read_bytes() for name in "abc")
    assert first == again != other
    manifests = [(tmp_path / name / MANIFEST).read_bytes() for name in "ab"]
    assert manifests[0] == manifests[1]
    tokens = json.loads(manifests[0])["tokens"]
    write_vectors(student, tmp_path / "d", 4, 1, tokens=tokens)
    assert (tmp_path / "d" / "prefill.safetensors").read_bytes() == first
    assert json.loads((tmp_path / "d" / MANIFEST).read_text())["seed"] is None


def test_half_precision_says_so(student: Path, tmp_path: Path) -> None:
    manifest = write_vectors(student, tmp_path / "half", 4, 1, dtype="bfloat16")
    assert manifest["tolerance"]["largest"] == 2e-2
    entries = manifest["steps"][0]["tensors"]
    assert entries["layers.1.mixer.output"]["dtype"] == "bfloat16"
    assert entries["layers.1.state.matrix.after"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": 0}, "prompt is 0 and steps 1; give at least 1 and 0"),
        ({"steps": -1}, "steps -1"),
        ({"dtype": "int8"}, 'dtype is "int8"; choose from float64, float32, bfloat16'),
        ({"tokens": [1, 2]}, "tokens: 2 are given, prompt and steps need 4"),
        ({"tokens": [1, 2, 61, 3]}, "tokens: 61 is outside of the vocabulary, 0 to 60"),
    ],
)
def test_what_cannot_be_recorded_is_said(student: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_vectors(student, tmp_path / "out", **({"prompt": 3, "steps": 1} | changes))
    assert not (tmp_path / "out").exists()


def test_a_token_that_stands_for_an_image_is_refused(tmp_path: Path) -> None:
    model = make_student()
    model.config.base_config["image_token_id"] = 60
    save_folder(tmp_path / "model", model.save_pretrained)
    with pytest.raises(
        ValueError, match="tokens: 60 is the model's image_token_id; a text model cannot read it"
    ):
        write_vectors(tmp_path / "model", tmp_path / "out", 2, 1, tokens=[5, 60, 7])
    manifest = write_vectors(tmp_path / "model", tmp_path / "out", 200, 0)
    assert 60 not in manifest["tokens"]


def test_every_name_is_described() -> None:
    assert describe("layers.3.state.keys.before")[0] == WHAT["keys"][0]
    assert describe("layers.3.mixer.input")[1] != describe("layers.3.input")[1]
    with pytest.raises(ValueError, match=r"layers.3.nothing: not a recorded tensor"):
        describe("layers.3.nothing")
