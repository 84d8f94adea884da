# SPDX-License-Identifier: Apache-2.0
"""The errors pyfast raises.

Every class derives from `PyfastError` and from the builtin that code written for PEFT, bitsandbytes or
torch already catches. A message says what happened with the user's own names and numbers, what it
means, and one fix. The code in brackets is stable.
"""

from __future__ import annotations


class PyfastError(Exception):
    """Base of all errors that pyfast raises on purpose."""

    code = "PF000"

    def __init__(self, message: str) -> None:
        super().__init__(f"[{self.code}] {message}")


class TargetModuleError(PyfastError, ValueError):
    """A name in `target_modules`, `modules_to_save` or a pattern matches no module."""

    code = "PF001"


class AdapterMismatchError(PyfastError, ValueError):
    """An adapter file has missing, unexpected or misshapen tensors for this model."""

    code = "PF002"


class NoGradientError(PyfastError, RuntimeError):
    """Nothing would train: no trainable parameter, or no gradient reaches one."""

    code = "PF003"


class NonFiniteError(PyfastError, ValueError):
    """A loss, gradient, weight or adapter holds NaN or infinity."""

    code = "PF004"


class EmptyTargetError(PyfastError, ValueError):
    """No label is left to learn from."""

    code = "PF005"


class EmbeddingNotSavedError(PyfastError, ValueError):
    """The vocabulary was resized but the embeddings are not part of the adapter."""

    code = "PF006"


class QuantizedMergeError(PyfastError, ValueError):
    """Merging an adapter into 4-bit weights would destroy it."""

    code = "PF007"


class ResumeError(PyfastError, ValueError):
    """A checkpoint lacks a part that an exact resume needs, or does not fit this run."""

    code = "PF009"


class CheckpointCorruptError(PyfastError, OSError):
    """A checkpoint is torn, altered or incomplete."""

    code = "PF010"


class CheckpointWriteError(PyfastError, OSError):
    """A checkpoint could not be written; the previous one is intact."""

    code = "PF011"


class QuantStateError(PyfastError, ValueError):
    """A quantised weight's parts do not fit together."""

    code = "PF013"


class UnsafeFileError(PyfastError, ValueError):
    """A file or path that pyfast refuses to open or write."""

    code = "PF014"


class DataError(PyfastError, ValueError):
    """A training record that cannot be used."""

    code = "PF015"


class UnsupportedError(PyfastError, ValueError):
    """A valid request that pyfast does not serve; the message lists the reasons."""

    code = "PF016"


class AdapterStateError(PyfastError, ValueError):
    """An adapter name, or an operation in this adapter state, that is not allowed."""

    code = "PF017"


class ConfigError(PyfastError, ValueError):
    """A configuration value out of its range or of the wrong type."""

    code = "PF018"


class AdapterNotFoundError(PyfastError, FileNotFoundError, ValueError):
    """There is no adapter at a path."""

    code = "PF019"
