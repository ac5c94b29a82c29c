import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_published import AUDIO, IMAGE, TOWERS, VIDEO, write_published
from trihybrid.models.checkpoint import load_teacher, load_teacher_config, open_teacher
from trihybrid.storage.folder import save_folder


def test_names_of_both_layouts_are_the_text_models(tmp_path: Path) -> None:
    teacher = write_published(tmp_path / "multimodal", unused=False)
    write_published(tmp_path / "text", text_only=True)
    wanted = set(teacher.state_dict()) - {"lm_head.weight"}
    multimodal, text = open_teacher(tmp_path / "multimodal"), open_teacher(tmp_path / "text")
    assert set(multimodal.text) == set(text.text) == wanted
    assert multimodal.names["model.norm.weight"] == ("model.language_model.norm.weight",)
    assert text.names == {name: (name,) for name in wanted}
    for name in wanted:
        assert torch.equal(multimodal.text[name].read(), text.text[name].read()), name
    assert not text.towers and not text.strangers


def test_every_tensor_of_a_multimodal_file_is_one_of_three(tmp_path: Path) -> None:
    write_published(tmp_path / "published", shards=3)
    path = tmp_path / "published" / "model-00001-of-00003.safetensors"
    save_file(load_file(path) | {"model.smell_tower.nose": torch.zeros(1), "extra": torch.zeros(1)}, path)
    teacher = open_teacher(tmp_path / "published")
    everything = set()
    for file in sorted((tmp_path / "published").glob("*.safetensors")):
        everything |= set(load_file(file))
    parts = [
        {name for names in teacher.names.values() for name in names},
        set(teacher.towers),
        set(teacher.strangers),
    ]
    assert set().union(*parts) == everything and sum(map(len, parts)) == len(everything)
    assert teacher.strangers == ["extra", "model.smell_tower.nose"]
    assert {name.split(".")[1] for name in teacher.towers} == {
        "vision_tower",
        "audio_tower",
        "embed_vision",
        "embed_audio",
    }
    assert all(name.startswith(TOWERS) for name in teacher.towers)


def test_tokens_for_media_are_kept_with_the_text_configuration(tmp_path: Path) -> None:
    write_published(tmp_path / "multimodal")
    write_published(tmp_path / "text", text_only=True)
    base = load_teacher_config(str(tmp_path / "multimodal"))
    assert (base.image_token_id, base.audio_token_id, base.video_token_id) == (IMAGE, AUDIO, VIDEO)
    assert not hasattr(load_teacher_config(str(tmp_path / "text")), "image_token_id")


@pytest.mark.parametrize("tied", [True, False])
def test_the_outer_configuration_says_whether_the_head_is_tied(tmp_path: Path, tied: bool) -> None:
    write_published(tmp_path / "published", tie_word_embeddings=tied)
    teacher = open_teacher(tmp_path / "published")
    # The text configuration's own default is True, and a file may leave it out.
    assert teacher.fields["tie_word_embeddings"] is True
    assert ("lm_head.weight" in teacher.text) is not tied


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_multimodal_teacher_the_text_model_is_read(
    tmp_path: Path, shards: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = write_published(tmp_path / "published", dtype=dtype, shards=shards)
    with caplog.at_level(logging.WARNING, logger="trihybrid"):
        loaded = load_teacher(tmp_path / "published")
    # Towers, and keys and values that no layer reads, are no surprise.
    assert not caplog.records
    assert loaded.dtype == dtype and loaded.generation_config.eos_token_id == [1, 106]
    tensors, found = teacher.state_dict(), loaded.state_dict()
    assert tensors.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    # Saved again it is a text model under the text model's names.
    save_folder(tmp_path / "text", loaded.save_pretrained)
    assert "model.layers.0.input_layernorm.weight" in load_file(tmp_path / "text" / "model.safetensors")
    again = load_teacher(tmp_path / "text")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert again.config.image_token_id == 250


def test_a_multimodal_teacher_without_a_tensor_is_refused(tmp_path: Path) -> None:
    write_published(tmp_path / "published")
    path = tmp_path / "published" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors are missing .* first model\.layers\.1\.mlp\.up_proj"):
        load_teacher(tmp_path / "published")


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    write_published(tmp_path / "published", shards=3)
    (tmp_path / "published" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"index\.json names model-00002-of-00003\.safetensors, not in the folder"
    ):
        load_teacher(tmp_path / "published")
