# SPDX-License-Identifier: Apache-2.0
"""What several tests of the ops measure with."""

from __future__ import annotations

import pytest
import torch


def dispatched(function):
    """What the call gives, and the ops of ours that went through torch's dispatcher: told by a profiler that
    they do not know of."""
    with pytest.MonkeyPatch.context() as patch, torch.autograd.profiler.profile() as profile:
        patch.setattr(torch._C._autograd, "_profiler_enabled", lambda: False)
        result = function()
    names = {event.name for event in profile.function_events}
    return result, {name for name in names if name.startswith("pyfast::")}
