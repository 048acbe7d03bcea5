"""Tiny random models of each family, written to disk as a hub folder would lie there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLModel,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLModel,
    Qwen3VLProcessor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

LINES = ["a small red circle on white", "a large blue square", "the green triangle", "what colour is the shape", "0123"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)


def _tokenizer(
    *special: str, lines: Sequence[str] = LINES, vocab_size: int = 400, **named: str
) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*named.values(), *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=list(special), model_max_length=512, **named
    )


def bert(folder: Path, dropout: float = 0.1) -> str:
    """A text encoder of 32 dimensions; sentence-transformers pools its mean."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def clip(folder: Path, image_size: int = 32) -> str:
    """A CLIP of 32 dimensions, by default on 32 x 32 pictures."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 64, **ids},
        vision_config={**tower, "image_size": image_size, "patch_size": 8},
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size)
    CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def siglip(folder: Path) -> str:
    """A SigLIP of 32 dimensions on 32 x 32 pictures."""
    torch.manual_seed(0)
    tokenizer = _tokenizer(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 32},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )
    SiglipModel(config).save_pretrained(folder)
    image = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(image_processor=image, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def _qwen(
    folder: Path,
    config_class: Any,
    model_class: Any,
    processor_class: Any,
    vision: dict[str, Any],
    patch_size: int,
    **vocabulary: Any,
) -> str:
    torch.manual_seed(0)
    ends: dict[str, Any] = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = _tokenizer("<|im_start|>", "<|im_end|>", *VISION, **vocabulary, **ends)
    ids = {name.strip("<|>"): tokenizer.convert_tokens_to_ids(name) for name in VISION}
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_parameters": ROPE}
    if "out_hidden_size" in vision and config_class is Qwen3VLConfig:
        text["head_dim"] = 16
    config = config_class(
        text_config=text,
        vision_config={"depth": 2, "num_heads": 2, "patch_size": patch_size, **vision},
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    model_class(config).save_pretrained(folder)
    processor_class(
        image_processor=Qwen2VLImageProcessor(patch_size=patch_size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def qwen2_vl(folder: Path, **vocabulary: Any) -> str:
    """A Qwen2-VL of 32 dimensions and 2 layers; its subwords are learned from ``lines``, at most ``vocab_size``."""
    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return _qwen(folder, Qwen2VLConfig, Qwen2VLModel, Qwen2VLProcessor, vision, 14, **vocabulary)


def qwen2_5_vl(folder: Path) -> str:
    """A Qwen2.5-VL of 32 dimensions and 2 layers."""
    vision = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    return _qwen(folder, Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2_5_VLProcessor, vision, 14)


def qwen3_vl(folder: Path) -> str:
    """A Qwen3-VL of 32 dimensions and 2 layers."""
    vision = {
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(folder, Qwen3VLConfig, Qwen3VLModel, Qwen3VLProcessor, vision, 16)


def internvl(folder: Path) -> str:
    """An InternVL of 32 dimensions on pictures of 28 x 28 and their crops: 1 token of text for every 2 x 2 patches."""
    torch.manual_seed(0)
    named: dict[str, Any] = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    ends: dict[str, Any] = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    tokenizer = _tokenizer("<|im_start|>", "<|im_end|>", *named.values(), **ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, extra_special_tokens=named, model_max_length=512, **ends
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **TEXT},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [28, 28],
            "patch_size": [7, 7],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    InternVLModel(config).save_pretrained(folder)
    template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>")
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": 28, "width": 28}, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=template,
    ).save_pretrained(folder)
    return str(folder)
