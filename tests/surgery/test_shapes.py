"""The account of every built-in shape against counts that others have published."""

import pytest

from trihybrid.models.anatomy import anatomy
from trihybrid.models.shapes import load_shape, shape_names
from trihybrid.surgery.cost import account
from trihybrid.surgery.layout import blueprint, student_config, student_heads
from trihybrid.surgery.plan import config_hash, make_plan
from trihybrid.surgery.section import Rwkv7Section, SurgerySection

# Name -> parameters of the published file (the hub's count of google/NAME-it), of its vision and audio parts (from
# transformers' own classes), and numbers in buffers of a vision tower that standardizes. E2B and E4B have a tower for
# vision, one for audio and two projections; the 12B an embedder of patches and a projection of waveforms.
PUBLISHED = {
    "gemma-4-e2b": (5_123_178_051, 167_364_608 + 304_824_608 + (768 + 1536) * 1536, 0),
    "gemma-4-e4b": (7_996_156_490, 167_364_608 + 304_824_608 + (768 + 1536) * 2560, 0),
    "gemma-4-12b": (11_959_730_224, 49_922_304 + 640 * 3840, 0),
    "gemma-4-26b-a4b": (25_805_936_206, 569_548_080 + 1152 * 2816, 2 * 1152),
    "gemma-4-31b": (31_273_088_876, 569_548_080 + 1152 * 5376, 2 * 1152),
}
# KerasHub's text presets, whose vocabulary is 262,144 in all sizes.
KERAS = {
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_099_328,
    "gemma-3-12b": 11_765_788_416,
    "gemma-3-27b": 27_009_002_240,
}
# Name -> parameters of the published file (the hub's count); Qwen3-1.7B's holds its tied head a second time.
OTHERS = {
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen3-1.7b": 2_031_739_904 - 151_936 * 2048,
    "qwen3-8b": 8_190_735_360,
}
# Parameters of the text model, parameters that a token uses, bytes of keys and values a token (before and after the
# plan without options), bytes of sliding windows, score FLOPs a pair before.
SIZES = {
    "gemma-4-e2b": (4_628_569_344, 2_279_759_104, 6_144, 7_168, 6_279_168, 57_344),
    "gemma-4-e4b": (7_463_013_376, 4_644_441_088, 16_384, 7_168, 20_930_560, 57_344),
    "gemma-4-12b": (11_907_350_272, 11_907_350_272, 16_384, 8_192, 335_216_640, 131_072),
    "gemma-4-26b-a4b": (25_233_141_760, 3_822_530_560, 20_480, 5_120, 209_510_400, 81_920),
    "gemma-4-31b": (30_697_345_280, 30_697_345_280, 81_920, 10_240, 838_041_600, 327_680),
}


@pytest.fixture(scope="module")
def accounts() -> dict[str, dict]:
    return {name: account(load_shape(name), None, [1, 4096]) for name in shape_names()}


def unused_keys_and_values(name: str) -> int:
    """Numbers of k_proj, v_proj and k_norm that the published files hold for layers which never read them."""
    base = load_shape(name)
    layers = [base.per_layer_config[i] for i in range(base.num_hidden_layers) if anatomy(base).owners[i] != i]
    return sum(layer.head_dim * (2 * layer.num_key_value_heads * base.hidden_size + 1) for layer in layers)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_holds_the_text_model_and_nothing_unexplained(accounts, name) -> None:
    total, others, buffers = PUBLISHED[name]
    scalars = load_shape(name).num_hidden_layers  # one layer_scalar each, a buffer
    text = accounts[name]["parameters"]
    assert text + others + buffers + scalars + unused_keys_and_values(name) == total


def test_unused_keys_and_values_of_e2b() -> None:
    assert unused_keys_and_values("gemma-4-e2b") == 18_880_512


@pytest.mark.parametrize("name", KERAS)
def test_gemma_3_has_64_rows_more_than_the_preset(accounts, name) -> None:
    base = load_shape(name)
    more = base.vocab_size - 262_144
    assert more == (0 if name == "gemma-3-1b" else 64)
    assert accounts[name]["parameters"] == KERAS[name] + more * base.hidden_size


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_of_other_families(accounts, name) -> None:
    """Published, and by hand: projections, MLP of three matrices, two norms and, in Qwen3, two of a head."""
    base = load_shape(name)
    heads, groups, channels = anatomy(base).template.sizes
    norms = 2 * base.hidden_size + (2 * channels if base.model_type == "qwen3" else 0)
    layer = base.hidden_size * (2 * (heads + groups) * channels + 3 * base.intermediate_size) + norms
    tables = base.vocab_size * base.hidden_size * (1 if base.tie_word_embeddings else 2)
    whole = base.num_hidden_layers * layer + tables + base.hidden_size
    assert accounts[name]["parameters"] == whole == OTHERS[name]
    assert accounts[name]["global_kv_bytes_per_token"] == base.num_hidden_layers * 2 * groups * channels * 2


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_gemma_4(accounts, name) -> None:
    parameters, active, growing, growing_after, windows, scores = SIZES[name]
    before = accounts[name]
    assert (before["parameters"], before["active_parameters"]) == (parameters, active)
    assert (before["global_kv_bytes_per_token"], before["sliding_cache_bytes"]) == (growing, windows)
    assert before["score_flops_per_pair"] == scores
    base = load_shape(name)
    after = account(base, student_config(base, SurgerySection()), [4096])
    assert after["global_kv_bytes_per_token"] == growing_after


def test_parts_of_e2b(accounts) -> None:
    """The table of the reference: attentions, MLPs, per-layer inputs and norms, summed over kinds of layers."""
    base, layers = load_shape("gemma-4-e2b"), accounts["gemma-4-e2b"]["layers"]
    attention: dict[tuple[str, bool], int] = {}
    rest: dict[tuple[str, bool], set[int]] = {}
    for row, kind in zip(layers, anatomy(base).kinds, strict=True):
        group = kind, row["keys_values"] == "own"
        attention[group] = attention.get(group, 0) + row["mixer_parameters"]
        rest.setdefault(group, set()).add(row["parameters"] - row["mixer_parameters"])
    assert attention == {
        ("sliding", True): 84_940_800,
        ("sliding", False): 100_667_392,
        ("full", True): 42_470_400,
        ("full", False): 50_333_696,
    }
    per_layer_input, norms = 27_578_880 // 35, 4 * 1536
    narrow, wide = 339_738_624 // 12, 905_969_664 // 16
    assert (narrow, wide) == (84_934_656 // 3, 226_492_416 // 4)
    for (_, own), found in rest.items():
        assert found == {(narrow if own else wide) + per_layer_input + norms}
    assert [round(layers[i]["parameters"] / 1e6, 2) for i in (0, 4, 15, 19)] == [36.18, 43.26, 63.71, 70.00]
    table, projection, embedding = 2_348_810_240, 13_762_560 + 256, 402_653_184
    whole = sum(row["parameters"] for row in layers) + table + projection + embedding + 1536
    # The reference counts the norm of the projection with it, as the table of 256 numbers that all layers share.
    assert accounts["gemma-4-e2b"]["parameters"] == whole
    assert accounts["gemma-4-e2b"]["active_parameters"] == whole - table


def test_experts_of_26b(accounts) -> None:
    """128 experts of 3 x 704 x 2816 are held, 8 are used and read; beside them stand a dense MLP and a router."""
    expert, dense, router = 3 * 704 * 2816, 3 * 2112 * 2816, 128 * 2816 + 2816 + 128
    norms = 7 * 2816
    for row in accounts["gemma-4-26b-a4b"]["layers"]:
        rest = row["parameters"] - row["mixer_parameters"]
        assert rest == 128 * expert + dense + router + norms
        assert row["active_parameters"] == row["mixer_parameters"] + 8 * expert + dense + router + norms
        matrices = 8 * expert + dense + 128 * 2816
        assert row["flops"]["4096"] > 2 * matrices
    # A sliding layer at one token: q, o of 16 heads of 256, k, v of 8; scores and values of one token.
    products = 2816 * 256 * (2 * 16 + 2 * 8)
    assert accounts["gemma-4-26b-a4b"]["layers"][0]["flops"]["1"] == 2 * (products + matrices) + 4 * 16 * 256


def test_bytes_that_a_token_reads(accounts) -> None:
    """Without context to speak of: two bytes for all that a token uses, the row of per-layer inputs, and the keys and
    values of one token in every layer, in those too that share them."""
    for name, row, one_token in (
        ("gemma-4-e2b", 35 * 256, 28 * 1024 + 7 * 2048),
        ("gemma-4-26b-a4b", 0, 25 * 2 * 8 * 256 * 2 + 5 * 2 * 2 * 512 * 2),
    ):
        found = accounts[name]
        assert found["bytes_read_per_token"]["1"] == 2 * (found["active_parameters"] + row) + one_token


def test_keys_are_values_in_global_layers_of_large_models(accounts) -> None:
    for name, heads, groups in (("gemma-4-12b", 16, 1), ("gemma-4-26b-a4b", 16, 2), ("gemma-4-31b", 32, 4)):
        base = load_shape(name)
        width, rows = base.hidden_size, accounts[name]["layers"]
        # Queries and output, keys that are values too, two norms; both keys and values are stored, as norms differ.
        assert rows[5]["mixer_parameters"] == 512 * (2 * heads + groups) * width + 2 * 512
        assert rows[5]["kv_bytes_per_token"] == 2 * groups * 512 * 2
        slot = make_plan(base, SurgerySection(), name, contexts=(64,))["layers"][5]
        assert (
            "k_proj rows permuted, with k_norm folded in for keys and without"
            in slot["sources"]["rwkv7.key, value"]
        )


def test_heads_of_the_student_of_31b() -> None:
    """32 query heads and 4 key heads of 512 are 128 and 16 of 128."""
    options = blueprint(load_shape("gemma-4-31b"), SurgerySection()).rwkv7_options()
    assert (options.heads, options.kv_heads, options.head_dim, options.hidden_size) == (128, 16, 128, 5376)
    assert anatomy(load_shape("gemma-4-31b")).template.width == 16_384


def test_a_blueprint_is_its_students_configuration() -> None:
    base = load_shape("gemma-4-e4b")
    for section in (SurgerySection(share_kv="teacher"), SurgerySection(legend={"S": "sliding", "R": "tica"})):
        plan, student = blueprint(base, section), student_config(base, section)
        assert plan.slots == student.slot_list()
        assert plan.tica_options() == student.tica_options()
        if plan.rwkv7 is not None:
            assert plan.rwkv7_options() == student.rwkv7_options()
        assert account(base, plan, [64]) == account(base, student, [64])


def test_the_plan_of_a_gemma_3() -> None:
    base = load_shape("gemma-3-27b")
    plan = make_plan(base, SurgerySection(), "gemma-3-27b", contexts=(4096,))
    assert not [line for line in plan["warnings"] if "a plan only" in line]
    # Ten global layers, 62 in all, the last one sliding; 16 key heads of 128.
    assert [layer["index"] for layer in plan["layers"] if layer["sources"]] == list(range(5, 62, 6))
    assert plan["before"]["global_kv_bytes_per_token"] == 10 * 2 * 16 * 128 * 2
    assert plan["after"]["global_kv_bytes_per_token"] == 10 * 1024
    sources = plan["layers"][5]["sources"]
    assert "rows one to one, 1 + its q_norm and the scale of scores folded in" in sources["rwkv7.receptance"]
    assert "1 + k_norm" in sources["rwkv7.key, value"] and "rms 1" not in sources["rwkv7.key, value"]
    student = student_config(base, SurgerySection())
    assert student.model_type == "trihybrid_gemma3"
    assert student.layer_types[:6] == ["sliding_attention"] * 5 + ["hybrid"]


def test_heads_of_which_all_channels_turn_keep_their_pairs_whole() -> None:
    """Gemma 3 turns all 256 channels of a head: each block of 128 takes 64 pairs."""
    base = load_shape("gemma-3-4b")
    heads = student_heads(base, SurgerySection())
    order = heads.channel_order()
    assert heads.blocks == 2
    assert order.tolist() == [*range(64), *range(128, 192), *range(64, 128), *range(192, 256)]
    wide = blueprint(base, SurgerySection(rwkv7=Rwkv7Section(head_dim=256))).rwkv7_options()
    plain = blueprint(base, SurgerySection(heads="plain")).rwkv7_options()
    assert (wide.heads, wide.kv_heads) == (8, 4)
    assert (plain.heads, plain.kv_heads) == (16, 8)


def test_the_hash_tells_families_and_their_parts_apart() -> None:
    base = load_shape("llama-3.2-1b")
    for name, value in (("attention_bias", True), ("tie_word_embeddings", False), ("hidden_act", "gelu")):
        other = load_shape("llama-3.2-1b")
        setattr(other, name, value)
        assert config_hash(other) != config_hash(base), name
    fields = base.to_dict() | {"model_type": "mistral"}
    assert config_hash(type(load_shape("mistral-7b-v0.3")).from_dict(fields)) != config_hash(base)
    wide, other = load_shape("qwen3-8b"), load_shape("qwen3-8b")
    other.max_position_embeddings *= 2
    assert config_hash(wide) == config_hash(other)


def test_the_hash_knows_experts_and_the_scale_of_scores() -> None:
    base, other = load_shape("gemma-4-26b-a4b"), load_shape("gemma-4-26b-a4b")
    other.top_k_experts = 4
    assert config_hash(base) != config_hash(other)
    gemma3, scaled = load_shape("gemma-3-1b"), load_shape("gemma-3-1b")
    scaled.query_pre_attn_scalar = 128
    assert config_hash(gemma3) != config_hash(scaled)
    # What a plan of E2B was made for before there were others.
    assert config_hash(load_shape("gemma-4-e2b")).startswith("da9779b817d4c43f")
