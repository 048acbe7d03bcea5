"""A mixture of tasks: which of them a run takes, where their files lie, how each is mined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import Path_fr, register_type

from b3_lightning.data.pairs import PairSource
from b3_lightning.mining import MiningSettings


class SourceList(list[dict[str, Any]]):
    """The entries of a YAML file that is named where sources are expected; its path is relative to the config's."""

    @classmethod
    def read(cls, path: Any) -> SourceList:
        """Read the file.

        Raises:
            ValueError: where the name is not that of a YAML file, or the file does not hold a list.
        """
        if not isinstance(path, str) or Path(path).suffix not in (".yaml", ".yml"):
            raise ValueError(f"{path} is not the name of a YAML file")
        entries = yaml.safe_load(Path_fr(path).get_content())
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"{path} must hold a list of sources, each with its path")
        return cls(entries)

    @staticmethod
    def plain(value: Any) -> list[dict[str, Any]]:
        """What a written config holds instead of the file's name."""
        if not isinstance(value, SourceList):
            raise ValueError(f"{value} is no list of sources read from a file")
        return list(value)


register_type(
    SourceList, serializer=SourceList.plain, deserializer=SourceList.read, uniqueness_key=("b3_lightning", "SourceList")
)

Sources = SourceList | str | PairSource | list[str | PairSource]
"""Files, folders or hub names; or a YAML file with a list of them."""


def place(sources: Sources, root: str, *, prompts: bool, split: str) -> list[PairSource]:
    """Every source with its path under ``root`` and, unless they are wanted, without its prompts.

    Args:
        root: folder of relative paths; ``.`` leaves paths as they are, and hub names with them.
        prompts: whether they are.
        split: of those that name none.
    """
    placed = []
    for entry in sources if isinstance(sources, list) else [sources]:
        source = _source(entry)
        source = replace(source, split=source.split or split)
        if root != ".":
            source = replace(source, task=source.name, path=str((Path(root) / source.path).absolute()))
        placed.append(source if prompts else replace(source, query_prompt="", target_prompt=""))
    return placed


def _source(entry: str | PairSource | dict[str, Any]) -> PairSource:
    if isinstance(entry, str):
        return PairSource(entry)
    return PairSource(**entry) if isinstance(entry, dict) else entry


def choose(sources: Sequence[PairSource], tasks: Sequence[str] | None) -> list[PairSource]:
    """The sources of these tasks, in the mixture's order; all where None are named.

    Raises:
        ValueError: where a name is no task of the mixture, or none are named.
    """
    if tasks is None:
        return list(sources)
    names = list(dict.fromkeys(source.name for source in sources))
    unknown = sorted(set(tasks) - set(names))
    if unknown or not tasks:
        raise ValueError(f"data.tasks={list(tasks)}: name some of the tasks of data.train_pairs; they are {names}")
    return [source for source in sources if source.name in tasks]


Prompts = dict[str, dict[str, list[str]]]
"""Side (``query``, ``target``) -> every prompt that its texts carry, the empty one included -> the tasks with it."""


def prompts_of(sources: Sequence[PairSource]) -> Prompts:
    """What stands before the texts of each side, over all tasks."""
    prompts: Prompts = {"query": {}, "target": {}}
    for source in sources:
        for side, prompt in (("query", source.query_prompt), ("target", source.target_prompt)):
            tasks = prompts[side].setdefault(prompt, [])
            if source.name not in tasks:
                tasks.append(source.name)
    return prompts


def mining_of(mining: MiningSettings, sources: Sequence[PairSource], tasks: Sequence[str] | None) -> MiningSettings:
    """The settings with those that sources bring for their tasks; ``per_task`` itself goes before them.

    Values of ``per_task`` for tasks of the mixture that are not trained on are left out.

    Raises:
        ValueError: where two sources of one task differ, or a value cannot be a task's own.
    """
    own: dict[str, dict[str, Any]] = {}
    for source in sources:
        if own.setdefault(source.name, source.mining) != source.mining:
            raise ValueError(
                f"task {source.name!r} is given the mining settings {own[source.name]} and {source.mining}; give it one"
            )
    per_task = {task: values | mining.per_task.get(task, {}) for task, values in own.items()}
    per_task |= {task: values for task, values in mining.per_task.items() if task not in own}
    left_out = set(own) - set(own if tasks is None else tasks)
    return replace(mining, per_task={task: own for task, own in per_task.items() if own and task not in left_out})
