"""What this machine's own kernels in C++ (`pallas_kernels/native`) can do, and the tests that need it."""

import pytest

from pallas_kernels.native import native

here = native()
needs_compiler = pytest.mark.skipif(bool(here.missing), reason=f"the native library {here.missing}")
needs_tiles = pytest.mark.skipif(not here.tiles, reason="this processor has no AMX")
