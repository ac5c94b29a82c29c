from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_published import AUDIO, IMAGE, TOWERS, VIDEO, write_published
from trihybrid.models.checkpoint import load_teacher_config, open_teacher


def test_names_of_both_layouts_are_the_text_models(tmp_path: Path) -> None:
    teacher = write_published(tmp_path / "multimodal", unused=False)
    write_published(tmp_path / "text", text_only=True)
    wanted = set(teacher.state_dict()) - {"lm_head.weight"}
    multimodal, text = open_teacher(tmp_path / "multimodal"), open_teacher(tmp_path / "text")
    assert set(multimodal.text) == set(text.text) == wanted
    assert multimodal.names["model.norm.weight"] == "model.language_model.norm.weight"
    assert text.names == {name: name for name in wanted}
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
    parts = [set(teacher.names.values()), set(teacher.towers), set(teacher.strangers)]
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
