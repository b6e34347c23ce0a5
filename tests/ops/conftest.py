"""The sizes here are small: one thread does."""

from __future__ import annotations
