"""Kernels of language models: one public function an operation, an implementation for every platform.

The package stands alone (jax, numpy and jaxtyping are all it imports) and never looks at who calls it.
"""

from pallas_kernels.attention.api import attention
from pallas_kernels.dispatch import explain
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.paged_attention.api import KVPages, cascade_attention, new_pages, paged_attention
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.tensor import QuantizedTensor, dequantize, quantize
from pallas_kernels.ragged_dot.api import ragged_dot
from pallas_kernels.ring_attention.api import ring_attention
from pallas_kernels.ring_attention.order import unzigzag, zigzag
from pallas_kernels.rotary.api import rotary

__all__ = [
    "KVPages",
    "QuantizedTensor",
    "attention",
    "cascade_attention",
    "dequantize",
    "explain",
    "linear_cross_entropy",
    "new_pages",
    "paged_attention",
    "quantize",
    "quantized_matmul",
    "ragged_dot",
    "ring_attention",
    "rotary",
    "unzigzag",
    "zigzag",
]
