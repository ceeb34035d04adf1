"""torch's attention, norm and Transformer modules on fastattn's kernels, and modules torch lacks.

The first group are subclasses of torch's classes with the same arguments and state_dict; `X.from_torch(module)`
shares the parameters of torch's module. docs/modules.md lists what differs from torch, and why.
"""

from .decoder import Transformer, TransformerDecoder, TransformerDecoderLayer
from .encoder import TransformerEncoder, TransformerEncoderLayer
from .grouped import FeedForward, GroupedQueryAttention, MultiQueryAttention
from .multihead import MultiheadAttention
from .norms import AddNorm, LayerNorm, RMSNorm, Softmax
from .positions import ALiBi, RotaryEmbedding, SinusoidalPositionalEncoding, T5RelativeBias
from .relative import ShawRelativeAttention, TransformerXLAttention

__all__ = [
    "ALiBi",
    "AddNorm",
    "FeedForward",
    "GroupedQueryAttention",
    "LayerNorm",
    "MultiQueryAttention",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "ShawRelativeAttention",
    "SinusoidalPositionalEncoding",
    "Softmax",
    "T5RelativeBias",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "TransformerXLAttention",
]
