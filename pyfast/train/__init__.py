# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning as one call: `finetune(FinetuneConfig(model=..., data=...))`."""

from pyfast.train.config import FinetuneConfig
from pyfast.train.loop import finetune
from pyfast.train.run import Result

__all__ = ["FinetuneConfig", "Result", "finetune"]
