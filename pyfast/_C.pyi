# SPDX-License-Identifier: Apache-2.0
"""The compiled extension. Call it through `pyfast.ops`, which checks and allocates.

Pointers and streams are integers. `device` is -1 for the CPU, else a CUDA ordinal. dtype codes: 0 float32,
1 float16, 2 bfloat16. `variant` forces a kernel by name; "" takes the first that fits. `threads` matters on
the CPU only. Kernel functions return the kernel's name, and raise ValueError for arguments that they do not
serve and RuntimeError for CUDA errors.
"""

from collections.abc import Sequence
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
def nf4_few_rows(
    *,
    device: int,
    x: int,
    pitch_x: int,
    packed: int,
    absmax: int,
    nested_absmax: int,
    offset: int,
    bias: int,
    y: int,
    pitch_y: int,
    m: int,
    n: int,
    k: int,
    dtype: int,
    blocksize: int,
    early: bool,
    threads: int,
    stream: int,
    variant: str = "",
) -> str: ...
def nf4_gemm(
    *,
    device: int,
    x: int,
    pitch_x: int,
    packed: int,
    absmax: int,
    nested_absmax: int,
    offset: int,
    z: int,
    pitch_z: int,
    b: int,
    pitch_b: int,
    bias: int,
    y: int,
    pitch_y: int,
    m: int,
    n: int,
    k: int,
    r: int,
    by_out: bool,
    dtype: int,
    blocksize: int,
    threads: int,
    stream: int,
    variant: str = "",
) -> str: ...
def dropout(
    *,
    device: int,
    x: int,
    out: int,
    dtype: int,
    rows: int,
    columns: int,
    threshold: int,
    seed: int,
    threads: int,
    stream: int,
    variant: str = "",
) -> str: ...

# Below: in builds with CUDA kernels only; csrc/lora/lora.h has the meaning of the arguments.
lora_counters: int

def lora_forward(
    device: int,
    stream: int,
    dtype: int,
    adapter_dtype: int,
    m: int,
    n: int,
    k: int,
    r: int,
    x: int,
    pitch_x: int,
    w: int,
    pitch_w: int,
    by_out: bool,
    a: int,
    b: int,
    scale: float,
    pitch_z: int,
    seed: int,
    threshold: int,
    workspace: int,
    counters: int,
    bias: int,
    columns: int,
    y: int,
    z: int,
    /,
) -> str: ...
def lora_backward(
    device: int,
    stream: int,
    dtype: int,
    adapter_dtype: int,
    m: int,
    n: int,
    k: int,
    r: int,
    x: int,
    pitch_x: int,
    w: int,
    pitch_w: int,
    by_out: bool,
    a: int,
    b: int,
    scale: float,
    pitch_z: int,
    seed: int,
    threshold: int,
    workspace: int,
    counters: int,
    dy: int,
    pitch_dy: int,
    z: int,
    dz: int,
    dx: int,
    da: int,
    db: int,
    add_da: bool,
    add_db: bool,
    /,
) -> str: ...
def lora_workspace(device: int, m: int, n: int, k: int, r: int, /) -> int: ...
def lora_group_forward(
    device: int,
    stream: int,
    dtype: int,
    adapter_dtype: int,
    m: int,
    k: int,
    x: int,
    pitch_x: int,
    scale: float,
    z: int,
    pitch_z: int,
    given: bool,
    workspace: int,
    counters: int,
    members: Sequence[tuple[int, ...]],
    /,
) -> str: ...
def lora_group_backward(
    device: int,
    stream: int,
    dtype: int,
    adapter_dtype: int,
    m: int,
    k: int,
    x: int,
    pitch_x: int,
    scale: float,
    z: int,
    pitch_z: int,
    given: bool,
    workspace: int,
    counters: int,
    members: Sequence[tuple[int, ...]],
    dz: int,
    dx: int,
    /,
) -> str: ...
def lora_group_workspace(
    device: int, m: int, k: int, members: Sequence[tuple[int, int, int]], /
) -> int: ...
def lora_group_gemm_name(
    device: int, m: int, k: int, members: Sequence[tuple[int, int, int]], transposed: bool, /
) -> tuple[str, str]: ...
def lora_group_makes(
    device: int, m: int, k: int, members: Sequence[tuple[int, int, int]], transposed: bool, /
) -> bool: ...
def lora_makes(device: int, m: int, n: int, k: int, r: int, transposed: bool, /) -> bool: ...
def lora_dx_over_x(device: int, m: int, n: int, k: int, r: int, /) -> bool: ...
def lora_gemm_name(
    device: int, m: int, n: int, k: int, pitch_w: int, by_out: bool, transposed: bool, /
) -> tuple[str, str]: ...
def lora_gemm(
    device: int,
    stream: int,
    dtype: int,
    by_out: bool,
    m: int,
    n: int,
    k: int,
    r: int,
    x: int,
    w: int,
    z: int,
    b: int,
    pitch_r: int,
    bias: int,
    y: int,
    kernel: int,
    swizzle: int,
    along_n: bool,
    blocks: int,
    q: int,
    workspace: int,
    counters: int,
    /,
) -> None: ...
def lora_allow_making(allowed: bool, /) -> None: ...
def lora_force_sm(sm: int, /) -> None: ...
def lora_gemm_kernels() -> list[str]: ...

# csrc/adapter/adapter.h has the meaning of the arguments.
def adapter_forward(
    device: int, stream: int, dtype: int, activation: int, m: int, k: int, r: int, x: int,
    pitch_x: int, down: int, up: int, norm_weight: int, norm_bias: int, h: int, stats: int,
    workspace: int, eps: float, down_bias: int, up_bias: int, y: int, /,
) -> str: ...  # fmt: skip
def adapter_backward(
    device: int, stream: int, dtype: int, activation: int, m: int, k: int, r: int, x: int,
    pitch_x: int, down: int, up: int, norm_weight: int, norm_bias: int, h: int, stats: int,
    workspace: int, dy: int, pitch_dy: int, active: int, dx: int, d_down: int, d_up: int,
    d_down_bias: int, d_up_bias: int, d_norm_weight: int, d_norm_bias: int, /,
) -> str: ...  # fmt: skip
def adapter_workspace(device: int, m: int, k: int, r: int, /) -> int: ...
def adapter_missing(device: int, r: int, /) -> str: ...

# csrc/dora/dora.h has the meaning of the arguments.
dora_most_rank: int

def dora_norms(
    device: int,
    stream: int,
    dtype: int,
    adapter_dtype: int,
    n: int,
    k: int,
    r: int,
    w: int,
    pitch_w: int,
    a: int,
    b: int,
    scale: float,
    norms: int,
    /,
) -> str: ...
def dora_scale(
    device: int,
    stream: int,
    by_row: bool,
    rows: int,
    columns: int,
    x: int,
    pitch: int,
    out: int,
    dtype: int,
    magnitude: int,
    norms: int,
    factor_dtype: int,
    r: int,
    b: int,
    scaled_b: int,
    /,
) -> str: ...
def dora_factors(
    device: int, stream: int, n: int, dtype: int, magnitude: int, norms: int, out: int, /
) -> None: ...
def dora_slices(device: int, m: int, n: int, /) -> int: ...
def dora_sums(
    device: int,
    stream: int,
    m: int,
    n: int,
    dy: int,
    pitch_dy: int,
    y: int,
    scaled_dy: int,
    dtype: int,
    magnitude: int,
    norms: int,
    parts: int,
    /,
) -> str: ...
def dora_finish(
    device: int,
    stream: int,
    m: int,
    n: int,
    r: int,
    parts: int,
    dtype: int,
    magnitude: int,
    norms: int,
    dmagnitude: int,
    factor_dtype: int,
    db: int,
    /,
) -> str: ...
def adapter_scale_backward(
    device: int, stream: int, dtype: int, scale_dtype: int, rows: int, cols: int, dy: int,
    pitch_dy: int, x: int, pitch_x: int, scale: int, parts: int, dx: int, d_scale: int, /,
) -> str: ...  # fmt: skip
def adapter_scale_workspace(device: int, rows: int, cols: int, /) -> int: ...

# csrc/adapter/scaled_gemm.h has the meaning of the arguments.
def scaled_linear_backward(
    device: int, stream: int, scale_dtype: int, m: int, n: int, k: int, dy: int, pitch_dy: int,
    w: int, pitch_w: int, x: int, pitch_x: int, scale: int, parts: int, dx: int, d_scale: int, /,
) -> str: ...  # fmt: skip
def scaled_linear_missing(device: int, m: int, n: int, k: int, /) -> str: ...
def scaled_linear_workspace(m: int, k: int, /) -> int: ...

# csrc/remake/norm.h has the meaning of the arguments.
def remake_norm(
    device: int,
    stream: int,
    dtype: int,
    rows: int,
    cols: int,
    x: int,
    inverse: int,
    weight: int,
    y: int,
    /,
) -> None: ...
