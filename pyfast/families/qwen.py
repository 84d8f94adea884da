# SPDX-License-Identifier: Apache-2.0
"""Qwen 2 and 2.5 (biases in q, k and v), and Qwen 3 (norms of q and k)."""

from dataclasses import replace

from pyfast.families.llama import LLAMA

QWEN2 = replace(LLAMA, name="Qwen 2/2.5", model_types=("qwen2",))
QWEN3 = replace(LLAMA, name="Qwen 3", model_types=("qwen3",))
