"""Shared by all families: configs, loading and saving, outputs, heads, losses, generation.

Nothing here knows a family.
"""
