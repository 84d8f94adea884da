# SPDX-License-Identifier: Apache-2.0
"""Measurements of pyfast and its peers; see README.md in this directory."""
