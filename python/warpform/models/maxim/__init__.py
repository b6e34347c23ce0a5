"""MAXIM (arXiv 2201.02973): image restoration by multi-axis gated MLPs."""

from .config import MAXIMConfig
from .model import ImageRestorationOutput, MAXIMForImageRestoration

__all__ = ["ImageRestorationOutput", "MAXIMConfig", "MAXIMForImageRestoration"]
