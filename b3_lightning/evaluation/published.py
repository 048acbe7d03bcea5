"""What others report, to stand beside ours and never to be taken for it; in percent.

Sources: B3 (arXiv 2505.11293) Tables 1, 2, 3 and 6; the score files of VLM2Vec v2.0.1 for the teachers' tasks; model
cards and the MMEB board for the newer ones, of which only the mean of the 36 image tasks is comparable. Rows are as
printed: the small teacher's does not add up (its groups give 60.1, it says 59.3), and the teachers' figures by task are
of other runs than Table 1 (their means are 59.7 and 65.4).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedRow:
    """A published model.

    Args:
        values: group -> percent, the groups being those of the suite.
        tasks: task -> percent, where they were published.
    """

    model: str
    source: str
    values: dict[str, float] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)


_MMEB_GROUPS = ("retrieval", "classification", "vqa", "grounding", "IND", "OOD", "all")


def _mmeb(model: str, source: str, *values: float, tasks: dict[str, float] | None = None) -> PublishedRow:
    return PublishedRow(model, source, dict(zip(_MMEB_GROUPS, values, strict=True)), tasks or {})


def _board(model: str, source: str, overall: float) -> PublishedRow:
    return PublishedRow(model, source, {"all": overall})


_TEACHERS = {
    "ImageNet-1K": (77.5, 80.2), "N24News": (73.8, 79.5), "HatefulMemes": (57.9, 70.3), "VOC2007": (74.3, 80.6),
    "SUN397": (73.7, 77.3), "Place365": (35.0, 37.2), "ImageNet-A": (50.6, 57.6), "ImageNet-R": (84.7, 74.2),
    "ObjectNet": (36.9, 40.5), "Country211": (21.7, 30.2), "OK-VQA": (48.2, 56.8), "A-OKVQA": (39.7, 47.5),
    "DocVQA": (82.7, 88.8), "InfographicsVQA": (47.3, 59.0), "ChartQA": (42.2, 56.6), "Visual7W": (50.9, 52.7),
    "ScienceQA": (30.5, 38.2), "VizWiz": (38.8, 39.6), "GQA": (48.1, 54.4), "TextVQA": (63.2, 71.6),
    "VisDial": (75.1, 81.6), "CIRR": (46.8, 51.4), "VisualNews_t2i": (73.4, 80.3), "VisualNews_i2t": (73.8, 81.2),
    "MSCOCO_t2i": (73.1, 77.5), "MSCOCO_i2t": (68.3, 73.6), "NIGHTS": (65.8, 67.5), "WebQA": (85.8, 88.3),
    "FashionIQ": (13.8, 16.8), "Wiki-SS-NQ": (54.6, 62.1), "OVEN": (68.4, 66.6), "EDIS": (81.4, 85.9),
    "MSCOCO": (65.7, 75.4), "RefCOCO": (80.8, 87.1), "RefCOCO-Matching": (76.6, 84.4),
    "Visual7W-Pointing": (69.1, 80.7),
}  # fmt: skip
_B3 = "B3"

MMEB: tuple[PublishedRow, ...] = (
    _mmeb("VLM2Vec-2B (teacher)", _B3, 65.4, 59.0, 49.4, 73.4, 66.0, 52.6, 59.3,
          tasks={name: pair[0] for name, pair in _TEACHERS.items()}),
    _mmeb("VLM2Vec-7B (teacher)", _B3, 69.9, 62.6, 57.8, 81.7, 72.2, 57.8, 65.8,
          tasks={name: pair[1] for name, pair in _TEACHERS.items()}),
    _mmeb("random Qwen2-VL-2B", _B3, 66.33, 66.47, 59.08, 75.30, 69.59, 60.05, 65.35),
    _mmeb("B3 Qwen2-VL-2B", _B3, 70.55, 66.89, 61.53, 78.15, 71.80, 62.97, 67.87),
    _mmeb("B3++ Qwen2-VL-2B", _B3, 70.85, 67.00, 61.19, 79.88, 72.11, 63.09, 68.10),
    _mmeb("B3 InternVL3-2B", _B3, 69.0, 62.6, 64.0, 86.9, 73.5, 60.8, 67.8),
    _mmeb("B3 InternVL3-8B", _B3, 73.2, 65.0, 68.8, 91.8, 77.6, 64.5, 71.8),
    _mmeb("B3++ Qwen2-VL-7B", _B3, 74.1, 70.0, 66.5, 84.6, 75.9, 67.1, 72.0),
    _mmeb("LLaVE LLaVA-OV-7B", _B3, 70.9, 65.7, 65.4, 91.9, 75.0, 64.4, 70.3),
    _mmeb("UniME LLaVA-OV-7B", _B3, 70.5, 66.8, 66.6, 90.9, 74.6, 65.8, 70.7),
    _board("SaHa 2B", "2025-08", 67.1),
    _board("SaHa 7B", "2025-08", 72.4),
    _board("QQMM-embed-v2", "2025-09", 75.3),
    _board("RzenEmbed-v2-7B", "2025-09", 75.9),
    _board("IFM-TTE-7B", "2025-10", 77.9),
    _board("Seed-1.6-1215 (closed)", "2025-12", 78.0),
    _board("Qwen3-VL-Embedding-2B", "2026-01", 75.0),
    _board("Qwen3-VL-Embedding-8B", "2026-01", 80.1),
    _board("MuCo 7B (extra data)", "2026", 73.6),
    _board("DME Large (closed)", "2026-08", 81.1),
    _board("QQMM-embed-v4 (closed)", "2026-08", 82.0),
    _board("WeMM-Embedding-2B", "2026-08", 79.6),
    _board("WeMM-Embedding-9B", "2026-08", 81.9),
)  # fmt: skip
"""Precision@1 on MMEB's 36 image tasks, unweighted means."""

_RETRIEVAL_TASKS = ("Flickr30K t2i", "Flickr30K i2t", "COCO t2i", "COCO i2t", "Urban1k t2i", "Urban1k i2t")


def _captions(model: str, source: str, *values: float) -> PublishedRow:
    return PublishedRow(model, source, tasks=dict(zip(_RETRIEVAL_TASKS, values, strict=True)))


RETRIEVAL: tuple[PublishedRow, ...] = (
    _captions("CLIP ViT-bigG/14", _B3, 79.5, 92.9, 51.3, 67.3, 77.8, 80.7),
    _captions("EVA-CLIP-8B", _B3, 80.3, 94.5, 52.0, 70.1, 80.4, 77.8),
    _captions("UniME LLaVA-Next-7B", _B3, 81.9, 93.4, 53.7, 70.1, 95.2, 95.9),
    _captions("UniME-V2 Qwen2-VL-7B", "UniME-V2", 84.6, 93.5, 57.3, 70.3, 97.2, 96.3),
    _captions("B3++ Qwen2-VL-2B", _B3, 82.8, 94.9, 59.0, 73.6, 96.3, 96.1),
    _captions("B3++ Qwen2-VL-7B", _B3, 85.5, 95.9, 62.8, 77.6, 98.1, 98.0),
)
"""Recall@1, zero-shot."""

_STS_TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSb", "SICK-R")


def _sts(model: str, *values: float) -> PublishedRow:
    *tasks, mean = values
    return PublishedRow(model, _B3, {"all": mean}, dict(zip(_STS_TASKS, tasks, strict=True)))


STS: tuple[PublishedRow, ...] = (
    _sts("SimCSE, RoBERTa-large", 75.63, 84.40, 78.06, 84.82, 81.87, 84.21, 77.00, 80.86),
    _sts("B3, RoBERTa-large", 77.49, 85.73, 80.37, 85.36, 82.75, 84.24, 75.40, 81.62),
    _sts("SimCSE, hard negatives", 77.30, 86.68, 82.20, 86.58, 84.02, 86.36, 81.84, 83.57),
    _sts("B3, hard negatives", 78.70, 87.58, 83.47, 87.22, 84.50, 86.85, 81.33, 84.24),
)
"""Spearman x 100, trained on NLI."""
