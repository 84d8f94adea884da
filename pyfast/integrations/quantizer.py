# SPDX-License-Identifier: Apache-2.0
"""Makes our quantizer known to transformers, through its public decorators, without importing transformers.

`pyfast.integrations.nf4_quantizer` does it when it is imported. That happens as soon as transformers' own
registry of quantizers is, so that `from_pretrained` finds ours however the two libraries were imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.quantizers.auto"
_OURS = "pyfast.integrations.nf4_quantizer"


class _Watch(MetaPathFinder, Loader):
    """Finds transformers' registry like everybody else, and imports ours right after it."""

    loader: Loader

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(_OURS)


def watch() -> None:
    """Register our quantizer now if transformers' registry is there, else as soon as it is."""
    if _REGISTRY in sys.modules:
        importlib.import_module(_OURS)
    else:
        sys.meta_path.insert(0, _Watch())


def nf4_config() -> Any:
    """`NF4Config`, whose base class is transformers'."""
    return importlib.import_module(_OURS).NF4Config


watch()
