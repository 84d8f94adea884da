# SPDX-License-Identifier: Apache-2.0
"""Gemma 1 (with CodeGemma), Gemma 2, and the text model of Gemma 3.

They scale embeddings by the root of the hidden size inside the embedding module, so that virtual tokens are
not scaled.
"""

from dataclasses import replace

from pyfast.families.llama import LLAMA

GEMMA = replace(LLAMA, name="Gemma 1, CodeGemma", model_types=("gemma",))
GEMMA2 = replace(LLAMA, name="Gemma 2", model_types=("gemma2",))
GEMMA3 = replace(LLAMA, name="Gemma 3 (text)", model_types=("gemma3_text",))
