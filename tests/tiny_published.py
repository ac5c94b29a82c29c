"""A tiny Gemma-4 folder in the layout of the hub: multimodal names, towers, unused keys and values, tokenizer files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma4AudioConfig, Gemma4Config, Gemma4ForConditionalGeneration, Gemma4VisionConfig

from tiny_gemma4 import build_teacher
from trihybrid.data import Tokenizer

VOCABULARY = 260
IMAGE, AUDIO, VIDEO = 250, 251, 252
TEMPLATE = "{{ bos_token }}{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
TOWERS = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")


def published_config(base: Any) -> Gemma4Config:
    """The multimodal configuration around a text configuration."""
    return Gemma4Config(
        text_config=base.to_dict(),
        vision_config=Gemma4VisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            position_embedding_size=8,
        ),
        audio_config=Gemma4AudioConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            subsampling_conv_channels=(4, 4),
            output_proj_dims=16,
        ),
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        video_token_id=VIDEO,
    )


def published_tensors(
    teacher: Any, config: Gemma4Config, dtype: torch.dtype, unused: bool = True
) -> dict[str, Tensor]:
    """Tensors of the multimodal checkpoint of a text model; `unused` adds keys and values that no layer reads."""
    generator = torch.Generator().manual_seed(11)
    text = {
        name: tensor
        for name, tensor in teacher.state_dict().items()
        if not (name == "lm_head.weight" and teacher.config.tie_word_embeddings)
    }
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
        for name, tensor in text.items()
    }
    with torch.device("meta"):
        whole = Gemma4ForConditionalGeneration(config)
    for name, tensor in whole.state_dict().items():
        if name.startswith(TOWERS):
            tensors[name] = torch.randn(tensor.shape, generator=generator)
    layers = teacher.config.num_hidden_layers
    if unused:
        for index in range(layers - teacher.config.num_kv_shared_layers, layers):
            attention = teacher.model.layers[index].self_attn
            for part in ("k_proj", "v_proj"):
                shape = (attention.head_dim, teacher.config.hidden_size)
                tensors[f"model.language_model.layers.{index}.self_attn.{part}.weight"] = torch.randn(
                    shape, generator=generator
                )
            tensors[f"model.language_model.layers.{index}.self_attn.k_norm.weight"] = torch.ones(
                attention.head_dim
            )
    return {name: tensor.detach().to(dtype).contiguous() for name, tensor in tensors.items()}


def write_tokenizer(folder: Path, begins: bool = False) -> None:
    """The byte tokenizer, as Gemma-4's: without a BOS of its own unless `begins`, with a chat template."""
    Tokenizer.bytes().save(folder)
    if not begins:
        path = folder / "tokenizer.json"
        fields = json.loads(path.read_text())
        fields["post_processor"] = None
        path.write_text(json.dumps(fields))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_published(
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    text_only: bool = False,
    unused: bool = True,
    begins: bool = False,
    **changes: Any,
) -> Any:
    """Write the folder; returns the text model that it holds."""
    changes = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY} | changes
    teacher = build_teacher(dtype, **changes)
    folder.mkdir(parents=True)
    if text_only:
        teacher.save_pretrained(folder)
    else:
        config = published_config(teacher.config)
        tensors = published_tensors(teacher, config, dtype, unused)
        fields = config.to_dict() | {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "dtype": str(dtype).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(fields, indent=2))
        (folder / "generation_config.json").write_text(
            json.dumps(
                {
                    "bos_token_id": 2,
                    "eos_token_id": [1, 106],
                    "pad_token_id": 0,
                    "do_sample": True,
                    "top_k": 64,
                }
            )
        )
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Gemma4Processor"}))
        _write_shards(folder, tensors, shards)
    write_tokenizer(folder, begins)
    return teacher


def _write_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
