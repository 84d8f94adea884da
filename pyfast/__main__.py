# SPDX-License-Identifier: Apache-2.0
"""`python -m pyfast` is the command line."""

import sys

from pyfast.cli import main

sys.exit(main())
