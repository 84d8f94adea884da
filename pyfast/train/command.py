# SPDX-License-Identifier: Apache-2.0
"""How the user of this process can call pyfast's command line."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """What a shell in this directory runs as `pyfast`, quoted.

    Its name where that finds the one of this environment, else its path, else `python -m pyfast`.
    """
    script = Path(sys.executable).with_name("pyfast")
    if not script.is_file():
        return f"{shlex.quote(sys.executable)} -m pyfast"
    found = shutil.which("pyfast")
    if found is not None and script.samefile(found):
        return "pyfast"
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))
