# SPDX-License-Identifier: Apache-2.0
"""What an adapter's directory says of it, before a model is loaded for it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pyfast.errors import ConfigError, UnsupportedError
from pyfast.integrations.adapter_file import read_fields
from pyfast.nn.bottleneck import Bottlenecks
from pyfast.nn.prompt import VirtualTokens
from pyfast.train.command import program

_UNMERGED = {"P_TUNING": VirtualTokens.no_merge, "BOTTLENECK": Bottlenecks.no_merge}


def adapter_config(adapter: str) -> dict[str, Any]:
    """What an adapter's adapter_config.json holds.

    Raises:
        ConfigError: There is none, or it is not JSON.
        UnsafeFileError: It is too large for one.
    """
    file = Path(adapter) / "adapter_config.json"
    if not file.is_file():
        inner = Path(adapter) / "adapter"
        fix = f" Fix: --adapter {inner}" if (inner / file.name).is_file() else ""
        raise ConfigError(
            f"'{adapter}' is not an adapter directory: it has no adapter_config.json.{fix}"
        )
    return read_fields(file)


def check_merges(adapter: str) -> None:
    """Refuse an adapter that is no part of weights, before a model is loaded for it.

    Raises:
        UnsupportedError: It is virtual tokens or a bottleneck.
    """
    if reason := _UNMERGED.get(str(adapter_config(adapter).get("peft_type"))):
        raise UnsupportedError(
            f"'{adapter}' cannot be merged into weights: {reason}. "
            f"Fix: use it as it is: {program()} generate --adapter {shlex.quote(adapter)}"
        )
