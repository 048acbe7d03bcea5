"""Zero-shot caption retrieval: Flickr30K, COCO, Urban1k, ShareGPT4V and whatever has their layout.

A set is ``NAME.parquet`` (or ``NAME/test-*.parquet``, .jsonl) with a row for each image: ``image``, its path, and
``captions``, the list of its captions (five of Flickr30K and COCO, one of Urban1k). Two tasks come of it: ``NAME t2i``,
every caption against all images, and ``NAME i2t``, every image against all captions.
"""

from __future__ import annotations

from b3_lightning.data.mmeb import find_task, without_image_token
from b3_lightning.data.pairs import Item
from b3_lightning.evaluation.scoring import SharedCandidates
from b3_lightning.evaluation.sets import EvalSet, ItemTable, ReadSettings, read_files
from b3_lightning.mining import fingerprint
from b3_lightning.types import name_rows


def read_retrieval(name: str, settings: ReadSettings) -> EvalSet:
    """Read one set.

    With ``settings.prompts`` captions and images carry the instructions of MMEB's MSCOCO_t2i and MSCOCO_i2t, which a
    vision-language model was trained with, so that an image is encoded as a query and as a target; without, captions
    are bare and images carry no text. The prompts of the settings go before queries and targets of both ways.

    Raises:
        FileNotFoundError: where the set or an image is not there.
        ValueError: where a row has no image or no caption.
    """
    columns, where = read_files(settings.data, name, ("image", "captions"))
    images = columns["image"]
    captions = [listed if isinstance(listed, list) else [listed] for listed in columns["captions"]]
    lacking = [
        row for row, image in enumerate(images)
        if not all(isinstance(text, str) and text.strip() for text in [image, *captions[row]]) or not captions[row]
    ]  # fmt: skip
    if lacking:
        raise ValueError(f"{where}: an image path and captions with text are needed; not so in {name_rows(lacking)}")
    tasks, items = {}, []
    flat = [(row, text.strip()) for row, listed in enumerate(captions) for text in listed]
    for way in ("t2i", "i2t"):
        before_caption, with_image = _instructions(way, settings)
        texts = [Item(before_caption + text, "") for _, text in flat]
        pictures = [Item(with_image, image) for image in images]
        tasks[way] = (texts, pictures)
        items += [*texts, *pictures]
    table = ItemTable(items, settings, where)
    owner = [row for row, _ in flat]
    scorings = {
        f"{name} {way}": _scoring(way, table.positions(texts), table.positions(pictures), owner)
        for way, (texts, pictures) in tasks.items()
    }
    notes = {"n_images": len(images), "n_captions": len(flat)}
    return EvalSet(name, table.items, table.contents, settings.root, dict(scorings), fingerprint(**columns), notes)


def _instructions(way: str, settings: ReadSettings) -> tuple[str, str]:
    """What goes before a caption, and what stands with an image; an image without any stays without text."""
    query, target = settings.query_prompt, settings.target_prompt
    asked = given = ""
    if settings.prompts:
        mmeb = find_task(f"MSCOCO_{way}")
        asked, given = (without_image_token(text.replace("{}", "")) for text in (mmeb.query_text, mmeb.target_text))
        given = mmeb.target_prompt or given
        asked = f"{asked} " if way == "t2i" else asked
    return (query + asked, target + given) if way == "t2i" else (target + given, query + asked)


def _scoring(way: str, text_F: list[int], image_N: list[int], owner_F: list[int]) -> SharedCandidates:
    """A caption that several images share is right for each of them, and so is an image that is there twice."""
    texts: list[dict[int, float]] = [{} for _ in image_N]
    images: dict[int, dict[int, float]] = {}
    for text, row in zip(text_F, owner_F, strict=True):
        texts[row][text] = 1.0
        images.setdefault(text, {})[image_N[row]] = 1.0
    if way == "t2i":
        return SharedCandidates(text_F, list(dict.fromkeys(image_N)), [images[text] for text in text_F])
    shared: dict[int, dict[int, float]] = {}
    for image, own in zip(image_N, texts, strict=True):
        shared.setdefault(image, {}).update(own)
    return SharedCandidates(image_N, list(dict.fromkeys(text_F)), [shared[image] for image in image_N])
