"""warpform inside other libraries, none of which is imported before it is asked for."""

from . import ring, transformers

__all__ = ["ring", "transformers"]
