"""What torch does inside a matrix product: the bounds of candidates.py depend on it, and the time that it takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

log = logging.getLogger(__name__)


def full_float32(device: torch.device) -> bool:
    """Do products of float32 read all its bits there, and not those of bfloat16 or TF32?

    Asked of the device's own setting: torch.get_float32_matmul_precision raises where the newer settings were used.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


def cpu_computes_bfloat16() -> bool:
    """Has this processor instructions for bfloat16 (avx512_bf16, amx_bf16, ARM's bf16), or does torch convert each one?

    Without them a product in bfloat16 takes several times as long as in float32, and gains nothing but memory.
    """
    return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)


def tell_slow_bfloat16(device: torch.device, setting: str, otherwise: str) -> None:
    """Warn of a setting that asks for bfloat16 where the processor lacks it, and name the one for float32."""
    if device.type == "cpu" and not cpu_computes_bfloat16():
        log.warning(
            "%s: this processor has no instructions for bfloat16, and takes several times as long as with %s",
            setting,
            otherwise,
        )


@contextmanager
def float32_sums() -> Iterator[None]:
    """Let products of 16-bit numbers be summed in float32 only.

    By default cuBLAS may add partial sums in 16 bits, which is beyond any bound that float32 sums keep.
    """
    matmul = torch.backends.cuda.matmul
    reductions = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in reductions}
    accumulation = matmul.allow_fp16_accumulation
    for name in reductions:
        setattr(matmul, name, False)
    matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)
        matmul.allow_fp16_accumulation = accumulation
