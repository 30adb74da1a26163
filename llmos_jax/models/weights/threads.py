"""The threads that weights are read with: numpy and the kernel work beside Python."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

NUM_THREADS = min(os.cpu_count() or 1, 8)


@functools.cache
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_THREADS, "weights")
