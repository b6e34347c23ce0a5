"""warpform inside other libraries, none of which is imported before it is asked for."""

from . import transformers

__all__ = ["transformers"]
