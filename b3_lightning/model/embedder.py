"""The embedder is a ``SentenceTransformer``: loaded from a path or name, or built small from a config."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from b3_lightning.model.adapters import complete_adapter, keep_in_float32
from b3_lightning.model.fused import FusedEmbedder

_MERGE = (
    ": where it is the export of a run with model.lora, go on in that run by --ckpt_path, or export it anew with "
    "--run.merge_adapter=true and begin from that"
)


@dataclass(frozen=True)
class SmallEmbedder:
    """An embedder from scratch: a small ResNet for images, a bag of subwords for texts, in one space.

    Made of stock modules, so that its export loads anywhere. Subwords are learned from the training texts.

    Args:
        hidden_sizes: channels of the ResNet's stages; the last is the dimension of the embeddings.
        image_size: images are resized to this square.
        vocabulary_size: at most so many subwords.
    """

    hidden_sizes: list[int] = field(default_factory=lambda: [32, 64, 128])
    image_size: int = 32
    vocabulary_size: int = 4096

    def __post_init__(self) -> None:
        if not self.hidden_sizes or min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must hold at least one number of channels, all above 0")

    def build(self, texts: Iterable[str]) -> SentenceTransformer:
        """Random weights (of torch's generator) and a vocabulary of ``texts``."""
        return self.assemble(_learn_subwords(texts, self.vocabulary_size))

    def assemble(self, tokenizer: Tokenizer) -> SentenceTransformer:
        """Random weights over a given vocabulary."""
        text = StaticEmbedding(tokenizer, embedding_dim=self.hidden_sizes[-1])
        image = [self._image_module(), Pooling(self.hidden_sizes[-1], "mean")]
        routes = {(None, "text"): "text", (None, "image"): "image"}
        router = Router({"text": [text], "image": image}, route_mappings=routes)
        return SentenceTransformer(modules=[router, Normalize()], device="cpu")

    def _image_module(self) -> Transformer:
        from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

        config = ResNetConfig(
            embedding_size=self.hidden_sizes[0],
            hidden_sizes=self.hidden_sizes,
            depths=[1] * len(self.hidden_sizes),
            layer_type="basic",
        )
        size = {"height": self.image_size, "width": self.image_size}
        with tempfile.TemporaryDirectory(prefix="b3_lightning_") as folder:
            # not save_pretrained: in a run of several processes only the first of them writes
            weights = {name: tensor.contiguous() for name, tensor in ResNetModel(config).state_dict().items()}
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            config.to_json_file(Path(folder) / "config.json")
            processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
            processor.to_json_file(Path(folder) / "preprocessor_config.json")
            return Transformer(
                folder,
                modality_config={"image": {"method": "forward", "method_output_name": "pooler_output"}},
                module_output_name="token_embeddings",
            )


def _learn_subwords(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["[UNK]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class LoadSettings:
    """How a model is loaded.

    Args:
        pooling: set for a plain transformers model (``lasttoken``, ``mean``, ``cls``); absent, the folder's own
            sentence-transformers modules are used.
        max_seq_length: tokens a text is cut to; the model's own limit where absent.
        min_pixels: an image is enlarged to at least so many, for Qwen2-VL and its kin.
        max_pixels: an image is shrunk to at most so many; given with ``min_pixels`` or not at all.
        dtype: of the weights, such as ``bfloat16``; float32 where absent. Adapters are float32 under any.
        chat_template: a Jinja template instead of the model's own, for what stands around texts and images; the
            VLM2Vec and B3 models were trained on the bare text with the image's token before it.
        gradient_checkpointing: trade compute for memory.
        trust_remote_code: run Python code that the model's repository brings, for architectures that transformers does
            not know. It may do anything that you may do: read it first, and pin what you read by ``revision``.
        revision: branch, tag or commit of the repository on the hub; its main branch where absent.
        attn_implementation: such as ``eager``, ``sdpa`` or ``flash_attention_2``; transformers' choice where absent.
    """

    pooling: Literal["lasttoken", "mean", "cls"] | None = None
    max_seq_length: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    dtype: str | None = None
    chat_template: str | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if (self.min_pixels is None) != (self.max_pixels is None):
            raise ValueError(f"min_pixels={self.min_pixels} and max_pixels={self.max_pixels}: give both or neither")
        if self.max_seq_length is not None and self.max_seq_length < 1:
            raise ValueError(f"max_seq_length={self.max_seq_length} must be at least 1")
        if self.dtype not in (None, "auto") and not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise ValueError(f"dtype={self.dtype} must be bfloat16, float16, float32 or auto")

    def for_teacher(self, *, same_model: bool, precision: str) -> LoadSettings:
        """How a teacher is loaded where nothing else is said.

        Trust and revision are of one repository, so another model does not inherit them. A teacher only encodes:
        weights that are kept in float32 to be trained may be bfloat16 where the trainer computes in it.
        """
        own = self if same_model else replace(self, trust_remote_code=False, revision=None)
        computes_in_bfloat16 = precision in ("bf16-mixed", "bf16-true")
        return replace(own, dtype="bfloat16") if own.dtype is None and computes_in_bfloat16 else own


@dataclass(frozen=True)
class LoraSettings:
    """A peft LoRA adapter; the defaults are those of the authors' training code, not of the paper's text.

    Args:
        target_modules: names of linear layers, or a regular expression.
    """

    r: int = 8
    alpha: int = 64
    dropout: float = 0.1
    use_dora: bool = True
    init: Literal["gaussian", "default"] = "gaussian"
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])


_MODEL_FILES = ("modules.json", "config.json", "adapter_config.json")
"""Of sentence-transformers, transformers and peft: a folder with none of them is no model."""


def load_embedder(path: str, load: LoadSettings, lora: LoraSettings | None) -> SentenceTransformer:
    """Load from a folder or a hub name, with unit-norm embeddings and, where asked for, a LoRA adapter."""
    _check_holds_model(Path(path))
    model = _load(path, load)
    complete_adapter(model, path, load.revision)
    if not isinstance(model[-1], Normalize):
        model.append(Normalize())
    if load.min_pixels is not None:
        _check_counts_pixels(model, path)
    if load.chat_template is not None:
        _set_template(model, load.chat_template, path)
    _pad_as_trained(model)
    if load.max_seq_length is not None:
        model.max_seq_length = load.max_seq_length
    if lora is not None:
        _add_lora(model, lora)
    if load.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _check_holds_model(folder: Path) -> None:
    """Refuse a folder without a model, such as a run's, before libraries guess at what it may be."""
    if not folder.is_dir() or _is_model(folder):
        return
    export = next((place for place in (folder / "export", folder.parent / "export") if _is_model(place)), None)
    hint = f"none of {', '.join(_MODEL_FILES)} is there"
    if export is not None:
        hint = f"that of its run is {export}"
    elif (folder / "config.yaml").is_file() or (folder.parent / "config.yaml").is_file():
        hint = "it is of a run, whose export folder is written when it ends: go on with it (fit --ckpt_path=last)"
    raise ValueError(f"{folder} holds no model: {hint}")


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MODEL_FILES)


def _load(path: str, load: LoadSettings) -> SentenceTransformer:
    hub: dict[str, Any] = {"trust_remote_code": load.trust_remote_code, "revision": load.revision}
    weights: dict[str, Any] = {"dtype": load.dtype or "float32"}
    if load.attn_implementation is not None:
        weights["attn_implementation"] = load.attn_implementation
    # Qwen2-VL's processor calls the fewest and most pixels of an image its shortest and longest edge
    size = {"shortest_edge": load.min_pixels, "longest_edge": load.max_pixels}
    pixels = {"size": size} if load.min_pixels is not None else {}
    at = "" if load.revision is None else f" at revision {load.revision!r}"
    try:
        if load.pooling is None:
            return SentenceTransformer(path, device="cpu", model_kwargs=weights, processor_kwargs=pixels, **hub)
        transformer = Transformer(
            path, model_kwargs=hub | weights, processor_kwargs=hub | pixels, config_kwargs=dict(hub)
        )
        pooling = Pooling(transformer.get_embedding_dimension(), load.pooling)
        return SentenceTransformer(modules=[transformer, pooling], device="cpu")
    except OSError as error:
        raise OSError(
            f"no model {path!r}{at}: no folder here (looked from {Path.cwd()}), and not found on the Hugging Face hub "
            "or in its cache. Check name and network (HF_HUB_OFFLINE); a private model needs `hf auth login`. It said: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (ValueError, ImportError) as error:
        if load.attn_implementation is None and "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path} does not load with trust_remote_code={load.trust_remote_code} and attn_implementation="
            f"{load.attn_implementation} of model.load: {str(error).splitlines()[0]}"
        ) from error


def _set_template(model: SentenceTransformer, template: str, path: str) -> None:
    """Replace the chat template; exports keep it, since it is saved with the processor."""
    first: Any = model[0]
    if getattr(getattr(first, "processor", None), "chat_template", None) is None:
        raise ValueError(f"model.load.chat_template: {path} has no chat template to replace; leave it out")
    first.processor.chat_template = template


def _pad_as_trained(model: SentenceTransformer) -> None:
    """Pad SigLIP's texts to their full length, as it was trained: it reads the last position, whatever stands there.

    Padded to the longest of a batch, a text's vector would depend on the texts beside it.
    """
    config: Any = getattr(model[0], "config", None)
    if str(getattr(config, "model_type", "")).startswith("siglip"):
        length = {"padding": "max_length", "max_length": config.text_config.max_position_embeddings}
        model[0].processing_kwargs["text"] = length | model[0].processing_kwargs.get("text", {})


def _check_counts_pixels(model: SentenceTransformer, path: str) -> None:
    """Refuse pixel limits for models that resize every image to one size: they would read them as edges."""
    image_processor = getattr(getattr(model[0], "processor", None), "image_processor", None)
    if not hasattr(image_processor, "merge_size"):
        raise ValueError(
            f"model.load.min_pixels and max_pixels are for Qwen2-VL and its kin; {path} resizes images its own way: "
            "leave them out"
        )


def _add_lora(model: SentenceTransformer, lora: LoraSettings) -> None:
    from peft import LoraConfig, NoMatchingPeftModuleError, TaskType

    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.use_dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        target_modules=lora.target_modules,
    )
    if has_adapter(model):
        raise ValueError(
            f"model.lora adds an adapter, and model.embedder has one{_MERGE}; only to use it, set model.lora=null"
        )
    try:
        model.add_adapter(config)
    except NoMatchingPeftModuleError as error:
        linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ValueError(
            f"model.lora.target_modules={lora.target_modules}: the model has none of these layers; it has {there}"
        ) from error
    keep_in_float32(model)


def has_adapter(model: torch.nn.Module) -> bool:
    """Did the model come with an adapter of its own? transformers freezes it, and all weights beneath."""
    return any(getattr(module, "_hf_peft_config_loaded", False) for module in model.modules())


def check_trained(model: SentenceTransformer, precision: str) -> None:
    """Refuse to train nothing, or weights below float32, unless the trainer's precision asks for that.

    Raises:
        ValueError: naming such weights.
    """
    trained = {name: weight.dtype for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        raise ValueError(f"all weights of model.embedder are frozen, so there is nothing to train{_MERGE}")
    low = {name: dtype for name, dtype in trained.items() if torch.finfo(dtype).bits < 32}
    if low and precision not in ("bf16-true", "16-true"):
        name, dtype = next(iter(low.items()))
        raise ValueError(
            f"{len(low)} of {len(trained)} trained weights are {str(dtype).removeprefix('torch.')}, such as {name}: "
            "steps at usual learning rates are lost in rounding. Keep them in float32, --model.load.dtype=null, with "
            "--trainer.precision=bf16-mixed; or train an adapter (model.lora); or, if you mean it, set "
            f"--trainer.precision=bf16-true instead of {precision}"
        )


def in_words(modality: Any) -> str:
    """``text``, ``image``, or both at once."""
    return modality if isinstance(modality, str) else f"{' and '.join(modality)} in one item"


def check_supports(model: SentenceTransformer | FusedEmbedder, name: str, modalities: Iterable[Any]) -> None:
    """Refuse pairs that hold what the model does not take: ``text``, ``image`` or ``(image, text)`` in one item."""
    unfit = sorted(in_words(modality) for modality in modalities if not model.supports(modality))
    if unfit:
        taken = ", ".join(in_words(modality) for modality in model.modalities)
        raise ValueError(
            f"{name} does not take {', '.join(unfit)}, which the pairs hold; it takes {taken}. "
            "Pictures with text in one item need a vision-language model, or model.fuse_teacher for a teacher like CLIP"
        )


def small_vocabulary(model: SentenceTransformer) -> str | None:
    """The vocabulary of a ``SmallEmbedder``'s model as JSON; None for any other model."""
    first = model[0]
    if isinstance(first, Router) and isinstance(first.sub_modules["text"][0], StaticEmbedding):
        vocabulary: str = first.sub_modules["text"][0].tokenizer.to_str()
        return vocabulary
    return None
