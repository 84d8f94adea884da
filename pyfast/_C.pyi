# SPDX-License-Identifier: Apache-2.0
"""The compiled extension. Call it through `pyfast.ops`, which checks and allocates.

Pointers and streams are integers. `device` is -1 for the CPU, else a CUDA ordinal. dtype codes: 0 float32,
1 float16, 2 bfloat16. `variant` forces a kernel by name; "" takes the first that fits. `threads` matters on
the CPU only. Kernel functions return the kernel's name, and raise ValueError for arguments that they do not
serve and RuntimeError for CUDA errors.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    build_type: str
    cuda: str | None
    cuda_architectures: list[str]
    cpu_isas: list[str]
    cutlass: str | None

class VariantInfo(TypedDict):
    name: str
    device: str
    reason: str

def build_info() -> BuildInfo: ...
def variants(op: str) -> list[VariantInfo]: ...
def nf4_quantize(
    *,
    device: int,
    src: int,
    dtype: int,
    numel: int,
    blocksize: int,
    packed: int,
    absmax: int,
    threads: int,
    stream: int,
    variant: str = "",
) -> str: ...
def nf4_nest(
    *,
    device: int,
    absmax: int,
    num_blocks: int,
    offset: int,
    codes: int,
    nested_absmax: int,
    threads: int,
    stream: int,
    variant: str = "",
) -> str: ...
def nf4_dequantize(
    *,
    device: int,
    packed: int,
    absmax: int,
    nested_absmax: int,
    offset: int,
    out: int,
    dtype: int,
    first_block: int,
    numel: int,
    blocksize: int,
    threads: int,
    stream: int,
    variant: str = "",
) -> str: ...
