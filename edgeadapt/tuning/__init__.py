"""Which export of an adapter, and which settings of a runtime, suit a device: measured there, held against budgets.

A recipe becomes candidates (`candidates.py`): exports that differ in precision, blocks, merging. Each one is exported
and measured with each number of threads and each runtime (`tune.py`). What no other trial beats is the Pareto set; of
those that keep the budgets the first in the objectives is the pick (`choose.py`), and its recipe makes it again.
"""

from edgeadapt.tuning.candidates import Candidate, candidates
from edgeadapt.tuning.choose import Trial
from edgeadapt.tuning.tune import OBJECTIVES, Tuning, tune

__all__ = ["OBJECTIVES", "Candidate", "Trial", "Tuning", "candidates", "tune"]
