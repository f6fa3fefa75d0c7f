"""A bundle at work, without torch: sessions, key-value caches, text generation, answers to texts and pictures."""

from edgeadapt.runtime.cache import Cache
from edgeadapt.runtime.generate import Generation
from edgeadapt.runtime.session import Session, open_session
from edgeadapt.runtime.tasks import answer

__all__ = ["Cache", "Generation", "Session", "answer", "open_session"]
