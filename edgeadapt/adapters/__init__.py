"""What was trained: adapter folders read without the library that wrote them, and resolved against a base."""

from __future__ import annotations

from edgeadapt.adapters.base_size import parameter_count
from edgeadapt.adapters.inspect import default_head_size, describe, task_of
from edgeadapt.adapters.read import read_adapters
from edgeadapt.adapters.resolve import resolve

__all__ = ["default_head_size", "describe", "parameter_count", "read_adapters", "resolve", "task_of"]
