"""llmos: an operating system for language models on TPUs and GPUs, in JAX.

Importing this package is cheap on purpose: jax is loaded only by the modules that need it.
"""

__version__ = "0.1.0"
