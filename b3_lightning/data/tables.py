"""Tables on disk: the one reader of Parquet, JSONL and CSV files, which says what is wrong with a file."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl", ".csv")
_SHARD = re.compile(r"(?P<split>.+?)-\d+-of-(?P<count>\d+)(-[0-9a-f]+)?\.parquet")


def read_table(path: str, split: str = "train") -> pa.Table:
    """All columns of a file, dataset folder or hub name, as they stand there.

    Args:
        split: of a folder or hub name.

    Raises:
        FileNotFoundError: where there is no such thing.
        ValueError: where a file cannot be read, is of an unknown kind, or has no such split; where the hub has nothing.
    """
    place = Path(path)
    if place.is_file():
        return read_file(place)
    if place.is_dir():
        return read_files(shards_of(place, split)) if find_shards(place) else _read_dataset_folder(place, split)
    if place.suffix or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"no pairs file {path} (looked from {Path.cwd()}; in a config data.pairs_root names another folder)"
        )
    import datasets

    try:
        return datasets.load_dataset(path, split=split).with_format("arrow")[:]
    except (ValueError, OSError) as error:  # no such split, or several sets of that name; no such name, or no network
        where = f"is no file or folder (looked from {Path.cwd()}), and as a dataset of the hub, split {split!r}"
        raise ValueError(f"{path} {where}: {error}") from error


def read_files(paths: Sequence[Path], columns: Sequence[str] | None = None, *, typed: bool = False) -> pa.Table:
    """The rows of several files, end to end; arguments and errors as of ``read_file``.

    Raises:
        ValueError: also where two differ in their columns.
    """
    tables = [read_file(path, columns, typed=typed) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if not table.schema.equals(tables[0].schema):
            raise ValueError(
                f"{path} has the columns {_schema(table)}, but {paths[0].name} beside it {_schema(tables[0])}; "
                "make them alike"
            )
    return pa.concat_tables(tables)


def _schema(table: pa.Table) -> dict[str, str]:
    return {column.name: str(column.type) for column in table.schema}


def read_file(path: Path, columns: Sequence[str] | None = None, *, typed: bool = False) -> pa.Table:
    """A table of one file, by the suffix of its name.

    Args:
        columns: those that are needed, in their order; all where absent.
        typed: take for numbers what looks like numbers in a CSV; else all of it is text, and ``007`` stays what it is.

    Raises:
        FileNotFoundError: where it is missing.
        ValueError: where it is empty, truncated, of another kind than its name says, lacks a column or has one twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (looked from {Path.cwd()})")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}; readable are {', '.join(SUFFIXES)} and dataset folders")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    try:
        table = _read_csv(path, typed) if path.suffix == ".csv" else _READERS[path.suffix](path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise ValueError(f"{path} has more than one column {twice}; rename or leave out all but one")
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks the column(s) {missing}; it has {table.column_names}")
    return table if columns is None else table.select(list(columns))


def check_output(output: Path, inputs: Iterable[str], *, folder: bool = False) -> None:
    """Refuse to write Parquet over what is read, or under a name that says another kind of file.

    Args:
        folder: a name without such an ending is one of a folder.

    Raises:
        ValueError: in either case.
    """
    if output.suffix != ".parquet" and (not folder or output.suffix in (*SUFFIXES, ".json")):
        raise ValueError(f"--output {output} must end in .parquet{' or name a new folder' if folder else ''}")
    if output.exists() and any(Path(path).exists() and output.samefile(path) for path in inputs):
        raise ValueError(f"--output {output} is what is read here, and would be lost; name another file")


def unreadable(path: Path, error: Exception) -> ValueError:
    """What to raise of a file that its reader refuses."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    how = "it is truncated, changed or of another kind than its name says; copy it anew, or write it again"
    if "changed from" in reason:  # in JSON
        how = "a column holds one kind of values in some rows and another in others: write texts in all, numbers quoted"
    if isinstance(error, UnicodeDecodeError) or "UTF8" in reason:
        how = "save it as UTF-8, as spreadsheets can on request; or copy it anew, where it is damaged"
    return ValueError(f"{path} cannot be read as {path.suffix} ({reason}): {how}")


def is_list(kind: pa.DataType) -> bool:
    """Does a column of this type hold lists, of whatever kind?"""
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def whole_numbers(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of fractions without any, such as pandas makes of whole numbers where one is missing, as what it was."""
    if not pa.types.is_floating(values.type):
        return values
    values = pc.if_else(pc.is_nan(values), None, values)
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:  # fractions there are
        return values


def _read_csv(path: Path, typed: bool) -> pa.Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    other = next((sign for sign in (";", "\t") if len(names) == 1 and sign in names[0]), None)
    if other is not None:
        raise ValueError(f"{path} separates its columns by {other!r}; save it with commas")
    columns = {} if typed else dict.fromkeys(names, pa.string())
    return pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=columns),
    )


def _read_jsonl(path: Path) -> pa.Table:
    """Texts that look like dates stay texts: JSON has no dates, and the reader makes some."""
    table = pyarrow.json.read_json(path)
    fields = [pa.field(column.name, _with_texts(column.type)) for column in table.schema]
    schema = pa.schema([column for column in fields if not table.schema.field(column.name).equals(column)])
    if not len(schema):
        return table
    texts = pyarrow.json.read_json(path, parse_options=pyarrow.json.ParseOptions(explicit_schema=schema))
    return texts.select(table.column_names)  # named fields come first, in whatever order a file has them


def _with_texts(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_timestamp(kind):
        return pa.string()
    return pa.list_(_with_texts(kind.value_type)) if is_list(kind) else kind


_READERS: dict[str, Callable[[Path], pa.Table]] = {".parquet": pq.read_table, ".jsonl": _read_jsonl}


def find_shards(folder: Path) -> dict[str, list[Path]]:
    """Every split's parquet files in a folder as the hub lays it out: ``SPLIT-00000-of-00002.parquet`` and so on."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.parquet")):
        shard = _SHARD.fullmatch(path.name)
        if shard is not None:
            found.setdefault(shard["split"], []).append(path)
    return found


def shards_of(folder: Path, split: str) -> list[Path]:
    """The parquet files of one split.

    Raises:
        ValueError: where there is no such split, or some of its files are missing.
    """
    shards = find_shards(folder)
    if split not in shards:
        raise ValueError(_no_split(folder, split, sorted(shards)))
    check_shards(shards[split])
    return shards[split]


def check_shards(paths: Iterable[Path]) -> None:
    """Refuse files of one split and folder, some of them named as the hub does, where these names tell of more."""
    shards = [(path, shard) for path in paths if (shard := _SHARD.fullmatch(path.name)) is not None]
    if shards and len(shards) != int(shards[0][1]["count"]):
        path, shard = shards[0]
        raise ValueError(
            f"{path.parent} holds {len(shards)} of the {int(shard['count'])} files of split {shard['split']!r}"
        )


def _no_split(path: Path, split: str, there: list[str]) -> str:
    return f"{path} has no split {split!r}; it has {there}: write {{path: {path}, split: NAME}}"


def _read_dataset_folder(path: Path, split: str) -> pa.Table:
    import datasets

    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(
            f"{path} is a folder without a dataset: neither SPLIT-00000-of-00001.parquet as the hub lays it out, nor "
            "what datasets.save_to_disk writes; name a file in it"
        )
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(_no_split(path, split, list(loaded)))
        loaded = loaded[split]
    return loaded.with_format("arrow")[:]
