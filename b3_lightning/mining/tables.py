"""Edges and rows as tables, one code for pyarrow on the CPU and cuDF on a GPU (narwhals serves both).

Joins give rows in any order on a GPU, so what is returned is sorted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import narwhals as nw

EDGE_COLUMNS = (
    "source", "target", "weight", "task", "community", "community_target", "cluster", "cluster_target"
)  # fmt: skip
TableLibrary = Literal["pyarrow", "pandas", "cudf"]


def read_edges(folder: str | Path, library: TableLibrary = "pyarrow") -> nw.DataFrame[Any]:
    """A saved plan's edges: ``source`` < ``target``, ``weight``, and of both ends ``task``, community and cluster.

    Args:
        folder: of the plan.
        library: whose table it is (``to_native()``); cudf needs a GPU and the extra ``rapids-cu13``.

    Returns:
        The columns of ``EDGE_COLUMNS``, sorted by the ends.
    """
    edges = nw.read_parquet(str(Path(folder) / "edges.parquet"), backend=library)
    rows = nw.read_parquet(str(Path(folder) / "plan.parquet"), backend=library)
    ends = rows.select("row", "community", "cluster")
    return (
        edges.join(rows.select("row", "task", "community", "cluster"), left_on="source", right_on="row", how="inner")
        .join(ends, left_on="target", right_on="row", how="inner", suffix="_target")
        .sort("source", "target")
        .select(*EDGE_COLUMNS)
    )


def count_edges(edges: nw.DataFrame[Any]) -> nw.DataFrame[Any]:
    """By task: how many edges, and how many of them lie inside a community and inside a cluster; sorted by task."""
    marked = edges.with_columns(
        in_community=(nw.col("community") == nw.col("community_target")).cast(nw.Int64),
        in_cluster=(nw.col("cluster") == nw.col("cluster_target")).cast(nw.Int64),
        n_edges=nw.col("source") * 0 + 1,
    )
    counted = marked.group_by("task").agg(nw.col("n_edges", "in_community", "in_cluster").sum())
    return counted.sort("task").select("task", "n_edges", "in_community", "in_cluster")
