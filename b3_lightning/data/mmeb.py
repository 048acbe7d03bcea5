"""The 36 datasets of MMEB, as its files and the paper have them: a table, and what its texts need before a model.

Sources: MMEB (arXiv 2410.05160) for datasets, split and instructions; B3 (arXiv 2505.11293, Table 13) for target
prompts; the released training mixture for the number of training rows (1,068,472 in all).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Meta = Literal["classification", "vqa", "retrieval", "grounding"]
METAS: tuple[Meta, ...] = ("retrieval", "classification", "vqa", "grounding")
"""The four meta-tasks, in the order of the paper's tables."""
IMAGE_TOKEN = "<|image_1|>"
"""Stands in MMEB's texts where the image belongs, and in some texts that have none."""
N_EVAL_QUERIES = 1000
"""Queries of every evaluation set."""

Kind = Literal["I", "T", "I+T"]
"""What one side is: an image, a text, or both. An image of MMEB still carries an instruction as its text."""


@dataclass(frozen=True)
class MmebTask:
    """One dataset.

    Args:
        name: as TIGER-Lab/MMEB-eval spells it.
        meta: which of the four meta-tasks.
        in_domain: is it among the 20 that are trained on (IND), or among the 16 that are not (OOD)?
        n_train_rows: rows of its MMEB-train file; 0 for those not trained on.
        query: what a query is.
        target: what a target is.
        query_text: the query's text as MMEB writes it, ``{}`` being the row's own words.
        target_text: the same of a target, without B3's prompt.
        target_prompt: what B3 puts before every target's text, hard negatives included, in training and evaluation.
        name_in_train: as TIGER-Lab/MMEB-train spells it, where that differs.
    """

    name: str
    meta: Meta
    in_domain: bool
    n_train_rows: int
    query: Kind
    target: Kind
    query_text: str
    target_text: str = "{}"
    target_prompt: str = ""
    name_in_train: str = ""

    @property
    def train_name(self) -> str:
        """Its name in TIGER-Lab/MMEB-train."""
        return self.name_in_train or self.name

    @property
    def split(self) -> str:
        """``IND`` or ``OOD``."""
        return "IND" if self.in_domain else "OOD"


_I = f"{IMAGE_TOKEN}\n"
CAPTION_PROMPT = "Represent the image caption: "
LABEL_PROMPT = "Represent the class label: "
ANSWER_PROMPT = "Represent the answer: "
_IMAGE_TARGET = f"{_I}Represent the given image."
_CROP_TARGET = f"{_I}Represent the given cropped image of the object"
_WIKIPEDIA_TARGET = f"{_I}Represent the given Wikipedia image with related text information: {{}}"


def _classification(
    name: str, n_train_rows: int, query_text: str, *, query: Kind = "I", name_in_train: str = ""
) -> MmebTask:
    return MmebTask(
        name, "classification", n_train_rows > 0, n_train_rows, query, "T", _I + query_text,
        target_prompt=LABEL_PROMPT, name_in_train=name_in_train,
    )  # fmt: skip


def _vqa(name: str, n_train_rows: int) -> MmebTask:
    question = f"{_I}Represent the given image with the following question: {{}}"
    return MmebTask(name, "vqa", n_train_rows > 0, n_train_rows, "I+T", "T", question, target_prompt=ANSWER_PROMPT)


def _retrieval(
    name: str, n_train_rows: int, kinds: tuple[Kind, Kind], query_text: str, target_text: str, target_prompt: str = ""
) -> MmebTask:
    return MmebTask(name, "retrieval", n_train_rows > 0, n_train_rows, *kinds, query_text, target_text, target_prompt)


def _grounding(name: str, n_train_rows: int, target: Kind, query_text: str, target_text: str) -> MmebTask:
    return MmebTask(name, "grounding", n_train_rows > 0, n_train_rows, "I+T", target, _I + query_text, target_text)


_EXPRESSION = "Select the portion of the image that follows the language expressions"
_CLASSIFY = "Represent the given image for classification"
_OBJECT = "Identify the object shown in the image"
_SCENE = "Identify the scene shown in the image"

TASKS: tuple[MmebTask, ...] = (
    _classification("ImageNet-1K", 100_000, _CLASSIFY, name_in_train="ImageNet_1K"),
    _classification(
        "N24News", 48_988,
        "Represent the given news image with the following caption for domain classification: {}", query="I+T",
    ),
    _classification(
        "HatefulMemes", 8_500,
        "Represent the given image for binary classification to determine whether it constitutes hateful speech or not",
    ),
    _classification("VOC2007", 7_844, _OBJECT),
    _classification("SUN397", 19_850, _SCENE),
    _classification("Place365", 0, _SCENE),
    _classification("ImageNet-A", 0, _CLASSIFY),
    _classification("ImageNet-R", 0, _CLASSIFY),
    _classification("ObjectNet", 0, _OBJECT),
    _classification("Country211", 0, "Identify the country depicted in the image"),
    _vqa("OK-VQA", 9_009),
    _vqa("A-OKVQA", 17_056),
    _vqa("DocVQA", 39_463),
    _vqa("InfographicsVQA", 23_946),
    _vqa("ChartQA", 28_299),
    _vqa("Visual7W", 69_817),
    _vqa("ScienceQA", 0),
    _vqa("VizWiz", 0),
    _vqa("GQA", 0),
    _vqa("TextVQA", 0),
    _retrieval(
        "VisDial", 123_287, ("T", "I"),
        "Represent the given dialogue about an image, which is used for image retrieval: {}", _IMAGE_TARGET,
    ),
    _retrieval(
        "CIRR", 26_116, ("I+T", "I"),
        f"{_I}Given an image, find a similar everyday image with the described changes: {{}}", _IMAGE_TARGET,
    ),
    _retrieval(
        "VisualNews_t2i", 99_903, ("T", "I"), "Retrieve an image of this news caption. {}", _IMAGE_TARGET
    ),
    _retrieval(
        "VisualNews_i2t", 100_000, ("I", "T"), f"{_I}Find a caption for the news in the given photo.", "{}",
        CAPTION_PROMPT,
    ),
    _retrieval(
        "MSCOCO_t2i", 100_000, ("T", "I"), "Find me an everyday image that matches the given caption: {}", _IMAGE_TARGET
    ),
    _retrieval(
        "MSCOCO_i2t", 113_287, ("I", "T"), f"{_I}Find an image caption describing the given everyday image.", "{}",
        CAPTION_PROMPT,
    ),
    _retrieval(
        "NIGHTS", 15_941, ("I", "I"), f"{_I}Find a day-to-day image that looks similar to the provided image.",
        _IMAGE_TARGET,
    ),
    _retrieval(
        "WebQA", 17_166, ("T", "I+T"), f"{_I}Find a Wikipedia image that answers this question: {{}}",
        _WIKIPEDIA_TARGET,
    ),
    _retrieval(
        "FashionIQ", 0, ("I+T", "I"), f"{_I}Find an image to match the fashion image and style note: {{}}",
        _IMAGE_TARGET,
    ),
    _retrieval(
        "Wiki-SS-NQ", 0, ("T", "I"), "Find the document image that can answer the given query: {}", _IMAGE_TARGET
    ),
    _retrieval(
        "OVEN", 0, ("I+T", "I+T"),
        f"{_I}Retrieve a Wikipedia image-description pair that provides evidence for the question of this image: {{}}",
        _WIKIPEDIA_TARGET,
    ),
    _retrieval(
        "EDIS", 0, ("T", "I+T"), f"{_I}Find a news image that matches the provided caption: {{}}",
        f"{_I}Represent the given image with related text information: {{}}",
    ),
    _grounding(
        "MSCOCO", 100_000, "I", 'Select the portion of the image that isolates the object labeled as "{}"', _CROP_TARGET
    ),
    _grounding("RefCOCO", 0, "I", f"{_EXPRESSION}. {{}}", _CROP_TARGET),
    _grounding("RefCOCO-Matching", 0, "I+T", f"{_EXPRESSION}: {{}}", f"{_I}{_EXPRESSION}: {{}}"),
    _grounding(
        "Visual7W-Pointing", 0, "I", 'Select the portion of the image that answers the question "{}"', _CROP_TARGET
    ),
)  # fmt: skip
"""All 36, by meta-task and then as the paper lists them."""

TRAIN_TASKS: tuple[MmebTask, ...] = tuple(task for task in TASKS if task.in_domain)
"""The 20 that are trained on."""


def by_meta(meta: Meta, tasks: Iterable[MmebTask] = TASKS) -> tuple[MmebTask, ...]:
    """Those of one meta-task."""
    return tuple(task for task in tasks if task.meta == meta)


def find_task(name: str) -> MmebTask:
    """The dataset of this name, as MMEB-eval or MMEB-train spells it.

    Raises:
        ValueError: where there is none.
    """
    for task in TASKS:
        if name in (task.name, task.train_name):
            return task
    raise ValueError(f"{name!r} is no dataset of MMEB; they are {', '.join(task.name for task in TASKS)}")


def without_image_token(text: str) -> str:
    """Take ``<|image_1|>`` out of a text, with the line break after it; what is left may be empty.

    The model's own processor puts its image token where the model wants it, and none where there is no image (the
    queries of WebQA and EDIS carry the placeholder without one).
    """
    return text.replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "").strip()
