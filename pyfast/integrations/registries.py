# SPDX-License-Identifier: Apache-2.0
"""Makes our quantizer and ChatGLM known to transformers, through its registries, without importing it.

The modules of `_OURS` do it when they are imported. That happens as soon as transformers' own registry of the
same kind is, so that `from_pretrained` finds ours however the two libraries were imported.
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

_OURS = {
    "transformers.quantizers.auto": "pyfast.integrations.nf4_quantizer",
    "transformers.models.auto.configuration_auto": "pyfast.integrations.chatglm",
}


class _Watch(MetaPathFinder, Loader):
    """Finds a registry of transformers like everybody else, and imports ours right after it."""

    loader: Loader

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.registry:
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
        importlib.import_module(_OURS[self.registry])


def watch(registry: str) -> None:
    """Register ours now if a registry of transformers is there, else as soon as it is."""
    if registry in sys.modules:
        importlib.import_module(_OURS[registry])
    else:
        sys.meta_path.insert(0, _Watch(registry))


def nf4_config() -> Any:
    """`NF4Config`, whose base class is transformers'."""
    return importlib.import_module(_OURS["transformers.quantizers.auto"]).NF4Config


for _registry in _OURS:
    watch(_registry)
