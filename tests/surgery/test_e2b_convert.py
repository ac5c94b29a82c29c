"""The checkpoint of `benchmarks/e2b_convert.py` is the published one in names and numbers, and its parts work small."""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "e2b_convert.py"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_layout_has_the_published_numbers(benchmark: ModuleType) -> None:
    shapes, fields = benchmark.published_shapes()
    counts: Counter[str] = Counter()
    for name, shape in shapes.items():
        sharing = name.startswith("model.language_model.layers.") and int(name.split(".")[3]) >= 15
        if sharing and any(f".self_attn.{part}." in name for part in ("k_proj", "v_proj", "k_norm")):
            counts["unused"] += math.prod(shape)
        elif name.endswith("layer_scalar"):
            counts["scalars"] += math.prod(shape)
        elif not name.endswith(("_min", "_max")):
            counts[name.split(".")[1]] += math.prod(shape)
    # 5,104,297,504 parameters, and 18,880,512 of keys and values that no layer reads.
    assert counts == {
        "language_model": 4_628_569_344,
        "scalars": 35,
        "vision_tower": 167_364_608,
        "audio_tower": 304_824_608,
        "embed_vision": 1_179_648,
        "embed_audio": 2_359_296,
        "unused": 18_880_512,
    }
    assert fields["model_type"] == "gemma4" and fields["text_config"]["num_hidden_layers"] == 35


def test_the_tokenizer_has_its_size_and_no_bos_of_its_own(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.make_tokenizer(tmp_path, 3000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 3000
    assert tokenizer("ab").input_ids == [tokenizer.convert_tokens_to_ids("ab")]


def test_the_copy_is_the_file(benchmark: ModuleType, tmp_path: Path) -> None:
    content = bytes(range(256)) * 5
    (tmp_path / "a").write_bytes(content)
    benchmark.drop_from_cache(tmp_path / "a")
    benchmark.copy(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == content
    about = json.loads(benchmark.about_itself())
    assert set(about) == {"peak", "cpu", "read", "written"} and about["peak"] > 1 << 26
