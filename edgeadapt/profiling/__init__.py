"""How fast and how large a bundle is on a device, measured in child processes."""

from edgeadapt.profiling.profile import Profile, profile
from edgeadapt.profiling.report import rows

__all__ = ["Profile", "profile", "rows"]
