"""Generated text and its uncertainty."""

from .result import Generation
from .text import generate

__all__ = ["Generation", "generate"]
