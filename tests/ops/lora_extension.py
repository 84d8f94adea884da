# SPDX-License-Identifier: Apache-2.0
"""An extension that does on the CPU, through the pointers and pitches that it is given, what csrc/lora/lora.h
says: with it the launches for CUDA run anywhere."""

from __future__ import annotations

import ctypes

import torch

from pyfast import _extension, ops
from pyfast.ops import _library, _nf4_operands, _philox
from pyfast.testing import seeded

DTYPES = {code: dtype for dtype, code in _extension.DTYPES.items()}
WHY = "torch's GEMM is faster"


def at(address, rows, columns, pitch, dtype):
    """The matrix in memory."""
    assert pitch >= columns
    size = ((rows - 1) * pitch + columns) * dtype.itemsize
    cells = (ctypes.c_char * size).from_address(address)
    return torch.frombuffer(cells, dtype=dtype).as_strided((rows, columns), (pitch, 1))


def put(to, value, add):
    """Store, or add to what is there."""
    to.copy_(to.double() + value if add else value)


class Extension:
    """csrc/lora on the CPU; all that is not LoRA's is the real extension's."""

    lora_counters = 32

    def __init__(self, gemm, makes=False):
        self.real, self.gemm, self.makes, self.calls = _extension.C, gemm, makes, []
        self.over_x = False

    def __getattr__(self, name):
        return getattr(self.real, name)

    def lora_gemm_name(self, device, m, n, k, pitch_w, by_out, transposed):
        assert pitch_w >= (k if by_out else n)
        return (self.gemm, "") if self.gemm else ("", WHY)

    def lora_workspace(self, device, m, n, k, r):
        return 256

    def lora_makes(self, device, m, n, k, r, transposed):
        return self.makes

    def lora_dx_over_x(self, device, m, n, k, r):
        return self.makes and r <= 16

    def problem(self, args):
        (device, stream, dtype, adapter, m, n, k, r, x, pitch_x, w, pitch_w, by_out, a, b, scale,
         pitch_z, seed, threshold, workspace, counters) = args  # fmt: skip
        assert (device, stream) == (None, 0)
        assert x % 16 == 0
        assert pitch_x % 8 == pitch_z % 8 == 0
        assert workspace - counters == 4 * self.lora_counters
        assert not at(counters, 1, self.lora_counters, self.lora_counters, torch.float32).any()
        at(workspace, 1, 64, 64, torch.float32).fill_(float("nan"))
        x = at(x, m, k, pitch_x, DTYPES[dtype]).double() if x else None
        if w:
            shape = (n, k) if by_out else (k, n)
            w = at(w, *shape, pitch_w, DTYPES[dtype]).double()
            w = w if by_out else w.t()
        keep = torch.ones(m, k, dtype=torch.float64)
        if seed:
            p = threshold / _philox.LEVELS
            keep = _philox.keep_mask(
                at(seed, 1, 2, 2, torch.int64)[0], m, k, p
            ) * _philox.keep_scale(p)
        a = at(a, r, k, k, DTYPES[adapter]).double() if a else None
        b = at(b, n, r, r, DTYPES[adapter]).double() if b else None
        return x, w, a, b, scale, keep

    def lora_forward(self, *args):
        x, w, a, b, scale, keep = self.problem(args[:21])
        bias, columns, y, z = args[21:]
        assert not columns
        dtype, m, n, r, pitch_z = DTYPES[args[2]], args[4], args[5], args[7], args[16]
        z = at(z, m, pitch_z, pitch_z, dtype)
        if a is not None:
            z.zero_()[:, :r] = scale * (x * keep) @ a.t()
        low = z[:, :r].double()
        if args[10]:
            shift = at(bias, 1, n, n, dtype).double() if bias else 0
            at(y, m, n, n, dtype).copy_(x @ w.t() + low @ b.t() + shift)
        self.calls.append("forward")
        return self.gemm if args[10] else ""

    def lora_backward(self, *args):
        x, w, a, b, scale, keep = self.problem(args[:21])
        dy, pitch_dy, z, dz, dx, da, db, add_da, add_db = args[21:]
        dtype, adapter, m, n, k, r = (DTYPES[args[2]], DTYPES[args[3]], *args[4:8])
        self.over_x = dx == args[8]
        assert dy % 16 == 0
        assert pitch_dy % 8 == 0
        dy = at(dy, m, n, pitch_dy, dtype).double()
        dz = at(dz, m, args[16], args[16], dtype)
        if (dx or da) and b is not None:
            dz.zero_()[:, :r] = scale * dy @ b
        low = dz[:, :r].double()
        if dx and args[10]:
            at(dx, m, k, k, dtype).copy_(dy @ w + low @ a * keep)
        if da:
            put(at(da, r, k, k, adapter), low.t() @ (x * keep), add_da)
        if db:
            z = at(z, m, r, args[16], dtype).double()
            put(at(db, n, r, r, adapter), dy.t() @ z, add_db)
        self.calls.append("backward")
        return self.gemm if dx and args[10] else ""

    def nf4_gemm(self, *, x, pitch_x, packed, absmax, nested_absmax, offset, z, pitch_z, b, pitch_b,
                 bias, y, pitch_y, m, n, k, r, by_out, dtype, blocksize, **place):  # fmt: skip
        dtype, blocks, shape = DTYPES[dtype], n * k // blocksize, (n, k) if by_out else (k, n)
        scales = {}
        if nested_absmax:
            inner = at(nested_absmax, 1, -(-blocks // 256), blocks, torch.float32)[0]
            scales = {
                "nested_absmax": inner,
                "nested_offset": at(offset, 1, 1, 1, torch.float32)[0, 0],
            }
        codes = at(packed, n * k // 2, 1, 1, torch.uint8)
        kind = torch.uint8 if nested_absmax else torch.float32
        w = ops.nf4_dequantize(
            codes, at(absmax, 1, blocks, blocks, kind)[0], shape, dtype, **scales
        )
        product = at(x, m, k, pitch_x, dtype).double() @ (w.t() if by_out else w).double()
        if r:
            assert z % 16 == b % 16 == pitch_z % 8 == pitch_b % 8 == 0
            factor = at(b, *((n, r) if by_out else (r, n)), pitch_b, dtype).double()
            low = at(z, m, r, pitch_z, dtype).double()
            product = product + low @ (factor.t() if by_out else factor)
        at(y, m, n, pitch_y, dtype).copy_(product + (at(bias, 1, n, n, dtype) if bias else 0))
        self.calls.append("nf4_gemm")
        return "nf4_gemm"


def use(extension, op, launch, monkeypatch):
    """Let an op be launched with the extension as it is for CUDA, by plans of its own."""
    monkeypatch.setattr(_extension, "C", extension)
    monkeypatch.setattr(_extension, "has_cuda", lambda: True)
    monkeypatch.setattr(launch, "raw_stream", lambda device: 0)
    monkeypatch.setattr(_nf4_operands, "device_of", lambda index: ((9, 0), 132))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("_forward_plan", "_backward_plan"):
        monkeypatch.setattr(op, name, _library.planned(getattr(op, name).__wrapped__))


def inputs(columns):
    """bfloat16 [..., columns] in every layout."""
    wide = seeded((9, 2 * columns), seed=7, dtype=torch.bfloat16)
    return {
        "one row": wide[0, :columns].contiguous(),
        "three axes": seeded((2, 3, columns), seed=8, dtype=torch.bfloat16),
        "no rows between": wide[:, :columns],
        "odd start": wide.view(-1)[1 : 1 + 8 * columns].view(8, columns),
        "odd pitch": wide.view(-1)[: 8 * (columns + 1)].view(8, columns + 1)[:, :columns],
        "every other": wide[:, ::2],
        "transposed": seeded((columns, 5), seed=9, dtype=torch.bfloat16).t(),
        "axes exchanged": seeded((3, 2, columns), seed=8, dtype=torch.bfloat16).transpose(0, 1),
        "one row for all": wide[:1, :columns].expand(4, columns),
        "one value for all": wide[:1, :1].expand(4, columns),
    }
