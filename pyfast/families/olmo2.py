# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: Llama's modules, with norms of q and k and norms behind attention and MLP instead of before them.

PEFT has no default targets for it.
"""

from dataclasses import replace

from pyfast.families.llama import LLAMA

OLMO2 = replace(LLAMA, name="OLMo 2", model_types=("olmo2",))
