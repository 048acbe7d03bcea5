"""A model that takes a text or an image, such as CLIP, for items that hold both: the vectors are added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

_BOTH = ("image", "text")


class FusedEmbedder(nn.Module):
    """Give an item of image and text the normalised sum of its two unit vectors; the model does all else.

    So are CLIP-like models compared on MMEB. It embeds and cannot be exported: for teachers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.prompts, self.max_seq_length = model.prompts, model.max_seq_length
        self.modalities = [*model.modalities, _BOTH]

    def supports(self, modality: Any) -> bool:
        """What the model takes, and both in one item."""
        return modality == _BOTH or bool(self.model.supports(modality))

    def preprocess(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Features of inputs of one kind; of both, a part for each."""
        if not isinstance(inputs[0], dict):
            return dict(self.model.preprocess(inputs))
        return {part: dict(self.model.preprocess([both[part] for both in inputs])) for part in _BOTH}

    def forward(self, features: dict[str, Any]) -> dict[str, Tensor]:
        """``sentence_embedding`` (P, D), of unit norm."""
        parts = [features[part] for part in _BOTH] if set(features) == set(_BOTH) else [features]
        vectors = [F.normalize(self.model(dict(part))["sentence_embedding"], dim=1) for part in parts]
        return {"sentence_embedding": F.normalize(sum(vectors[1:], vectors[0]), dim=1)}
