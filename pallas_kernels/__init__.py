"""Attention, grouped matmul and fused loss: one public function each, an implementation for every platform.

The package stands alone (it imports jax and nothing else) and never looks at who calls it.
"""

from pallas_kernels.attention.api import attention
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pallas_kernels.ragged_dot.api import ragged_dot

__all__ = ["attention", "linear_cross_entropy", "ragged_dot"]
