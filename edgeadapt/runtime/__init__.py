"""A bundle at work, without torch: sessions, key-value caches, text generation, answers to texts and pictures."""

from edgeadapt.runtime.batch import Batch, Request
from edgeadapt.runtime.cache import Cache
from edgeadapt.runtime.opening import open_session
from edgeadapt.runtime.promotion import Promotion
from edgeadapt.runtime.session import Session
from edgeadapt.runtime.tasks import answer
from edgeadapt.runtime.writer import Generation

__all__ = ["Batch", "Cache", "Generation", "Promotion", "Request", "Session", "answer", "open_session"]
