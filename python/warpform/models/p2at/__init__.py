"""P2AT, pyramid pooling axial transformer (arXiv 2310.15025): real-time segmentation on a ResNet.

The coarsest map passes two blocks whose attention is over the means of rows and of columns, a few dozen tokens. Three
decoder blocks of depthwise convolutions, two fusions with finer maps and a refinement lead back to stride 4. Features
are [batch, height, width, channels] throughout, and convolutions of one tap are `nn.Linear`.
"""

from .config import P2ATConfig
from .model import P2ATForSemanticSegmentation, P2ATOutput

__all__ = ["P2ATConfig", "P2ATForSemanticSegmentation", "P2ATOutput"]
