"""Schemes: how a weight is stored. One file each, found by its name; `quantize/scheme.py` says what it holds."""
