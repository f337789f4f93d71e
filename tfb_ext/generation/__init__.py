"""Generated text and its uncertainty."""

from .generate import generate
from .result import Generation

__all__ = ["Generation", "generate"]
