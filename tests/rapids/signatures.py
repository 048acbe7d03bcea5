"""The signatures of every RAPIDS function that the GPU backend calls, as JSON.

    python tests/rapids/signatures.py > tests/rapids/signatures.json       where the real packages are installed

Tests bind the backend's calls to the committed file; where the packages are installed, the file is held against them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_suffix(".json")
FUNCTIONS = {
    "pylibcugraph": ("louvain", "leiden", "ResourceHandle", "GraphProperties", "SGGraph"),
    "cugraph": ("louvain", "leiden", "Graph", "Graph.from_cudf_edgelist", "Graph.from_dask_cudf_edgelist"),
    "cugraph.dask": ("louvain", "leiden"),
    "cugraph.dask.comms.comms": ("initialize", "destroy"),
    "cudf": (
        "DataFrame",
        "Series",
        "read_parquet",
        *(
            f"DataFrame.{name}"
            for name in ("merge", "groupby", "sort_values", "rename", "take", "dropna", "astype", "copy", "reset_index")
        ),
    ),
    "dask_cudf": ("read_parquet",),
    "dask_cuda": ("LocalCUDACluster",),
    "cupy": ("from_dlpack",),
    "cuvs.neighbors.brute_force": ("build", "search"),
}
"""Module -> what is called of it."""
DISTRIBUTIONS = ("pylibcugraph-cu13", "cugraph-cu13", "cudf-cu13", "cuvs-cu13", "dask-cuda", "cupy-cuda13x")
_IN_SOURCE = {"SGGraph": "graphs.pyx", "GraphProperties": "graph_properties.pyx"}
"""Compiled classes show no signature; their wheel ships the source."""


def collect() -> dict[str, Any]:
    """Every function's parameters: name -> [kind, has a default]; and the versions that they are of."""
    found: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}}
    for module_name, names in FUNCTIONS.items():
        module = importlib.import_module(module_name)
        for name in names:
            value: Any = module
            for part in name.split("."):
                value = getattr(value, part)
            found[f"{module_name}.{name}"] = _parameters(module, name, value)
    return found


def _parameters(module: Any, name: str, value: Any) -> dict[str, list[Any]]:
    if name in _IN_SOURCE:
        return _from_source(Path(module.__file__).parent / _IN_SOURCE[name], name)
    try:
        signature = inspect.signature(value)
    except ValueError:  # a compiled class without arguments
        return {}
    return {
        name: [parameter.kind.name, parameter.default is not inspect.Parameter.empty]
        for name, parameter in signature.parameters.items()
        if name != "self"
    }


def _from_source(path: Path, name: str) -> dict[str, list[Any]]:
    """Parameters of a class's constructor as Cython wrote it."""
    source = path.read_text()
    body = source[re.search(rf"cdef class {name}\b", source).end() :]  # type: ignore[union-attr]
    listed = re.search(r"def __(?:cinit|init)__\((.*?)\):", body, re.DOTALL).group(1)  # type: ignore[union-attr]
    found = {}
    for part in re.sub(r"#.*", "", listed).split(","):
        declared, *default = part.split("=")
        word = declared.split()[-1] if declared.split() else ""
        if word and word != "self":
            found[word] = ["POSITIONAL_OR_KEYWORD", bool(default)]
    return found


if __name__ == "__main__":
    json.dump(collect(), sys.stdout, indent=1)
    sys.stdout.write("\n")
