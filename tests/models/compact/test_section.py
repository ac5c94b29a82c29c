"""The section of a compact model: what it says, what it refuses."""

import pytest
import yaml

from trihybrid.models.compact import CompactModel, CompactSection
from trihybrid.models.pattern import Slot

SMALL = {
    "hidden_size": 12, "pattern": "TF", "heads": 4, "kv_heads": 2, "head_dim": 4, "rope_dims": 2,
    "bigram_buckets": 8, "bigram_width": 4, "value_embedding_layers": [],
}  # fmt: skip


def last(entry: object) -> dict[str, object]:
    """The change that gives the last layer this entry of the legend."""
    return {"legend": {"T": "token_shift", "F": entry}}


def test_the_default_is_the_seed_with_round_windows() -> None:
    section = CompactSection()
    slots = section.slots()
    assert [slot.mixers[0] for slot in slots] == [
        *["token_shift"] * 4, "sliding", *["token_shift"] * 2, "sliding", *["token_shift"] * 2, "full"
    ]  # fmt: skip
    assert [slots[i].options for i in (4, 7, 10)] == [
        {"window": 128}, {"window": 128, "xsa": True}, {"xsa": True}
    ]  # fmt: skip
    assert (section.inner_size, section.first_attention) == (1536, 4)


def test_what_it_derives() -> None:
    assert CompactSection(pattern="T*3", value_embedding_layers=[]).first_attention == 3
    assert CompactSection(hidden_size=10, mlp_ratio=0.01).inner_size == 1
    assert CompactSection(hidden_size=100, mlp_ratio=2.666).inner_size == 267


def test_survives_yaml() -> None:
    section = CompactSection(**SMALL, legend={"T": "token_shift", "F": {"mixer": "full", "xsa": True}})
    assert CompactSection.model_validate(yaml.safe_load(yaml.safe_dump(section.model_dump()))) == section


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"heads": 2**40, "kv_heads": 2**40}, "heads"),
        ({"pattern": "R", "rwkv7": {"head_dim": 2**40}}, "head_dim"),
        ({"hiden_size": 8}, "hiden_size"),
        ({"softcap": 0.0}, "softcap"),
        ({"bigram_scale": float("nan")}, "bigram_scale"),
        ({"norm_scale": "some"}, "norm_scale"),
        ({"pattern": ""}, "write letters and repeats"),
        ({"pattern": "TZ"}, 'letter "Z" is not in the legend'),
        ({"pattern": "T*0"}, "no layer"),
        (last("sliding"), 'legend "F": sliding needs a window'),
        (last(["full", "sliding"]), 'legend "F": sliding needs a window'),
        ({"legend": {"T": {"mixer": "token_shift", "window": 3}, "F": "full"}}, r"takes \"mixer\" and \['back'\]"),
        ({"legend": {"T": {"mixer": "token_shift", "back": 0}, "F": "full"}}, r"token_shift\.back is 0"),
        ({"legend": {"T": {"mixer": "token_shift", "back": 1.5}, "F": "full"}}, "back of .* is 1.5; it must be an int"),
        ({"legend": {"T": {"back": 2}, "F": "full"}}, 'no "mixer"; name one'),
        ({"legend": {"T": "mamba", "F": "full"}}, 'no mixer "mamba"'),
        (last({"mixer": "full", "window": 8}), 'has the options'),
        (last({"mixer": "full", "xsa": "no"}), "xsa of .* is 'no'; it must be true or"),
        (last({"mixer": "full", "xsa": 1}), "xsa of .* is 1; it must be true or"),
        (last({"mixer": "full", "rope_dims": 6}), r"attention\.rope_dims is 6"),
        (last({"mixer": "sliding", "window": None}), "window of .* is None; it must be"),
        (last({"mixer": "sliding", "window": True}), "window of .* is True; it must be"),
        (last({"mixer": "sliding", "window": "8"}), "window of .* is '8'; it must be"),
        (last({"mixer": "sliding", "window": 0}), r"attention\.window is 0"),
        (last({"mixer": "sliding", "window": 2**70}), r"attention\.window is 1180591620717411303424"),
        ({"heads": 3}, r"attention\.heads is 3; it must be a multiple of attention\.kv_heads, 2"),
        ({"rope_dims": 3}, r"attention\.rope_dims is 3"),
        ({"pattern": "R", "rwkv7": {"heads": 3}}, r"rwkv7\.heads is 3"),
        ({"pattern": "Q", "legend": {"Q": "tica"}, "tica": {"heads": 3}}, r"tica\.heads is 3"),
        ({"value_embedding_layers": [2]}, "give different layers from 0 to 1"),
        ({"value_embedding_layers": [-1]}, "give different layers from 0 to 1"),
        ({"value_embedding_layers": [1, 1]}, "give different layers from 0 to 1"),
        ({"bigram_buckets": 1}, r"bigram_buckets is 1; it must be 0 \(none\) or at least 2"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompactSection.model_validate(SMALL | change)


def test_sizes_that_no_layer_has_are_not_held_against_it() -> None:
    section = CompactSection.model_validate(SMALL | {"pattern": "T", "heads": 3, "rope_dims": 7})
    assert section.slots() == [Slot(("token_shift",))]
    assert not any("Attention" in type(module).__name__ for module in CompactModel(section, 9).modules())
