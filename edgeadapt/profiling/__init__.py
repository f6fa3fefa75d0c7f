"""How fast and how large a bundle is on a device, measured in processes of their own.

A bundle and a workload become a job (`job.py`), a folder with all that a device needs; a transport takes it there; a
program (`device_side/runner.py`) runs it through one of the runtimes and prints raw samples; `assemble.py` makes a
`Profile` of them. For devices that are not there, `predict.py` counts a graph's work and divides it by their rates.
"""

from edgeadapt.profiling.figures import Profile
from edgeadapt.profiling.profile import profile
from edgeadapt.profiling.report import rows

__all__ = ["Profile", "profile", "rows"]
