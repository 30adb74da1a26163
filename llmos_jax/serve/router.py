"""Which replica gets a request: the one that has its prefix in its pages, unless it is much busier than the least busy.

A replica's cached prefixes are remembered here as chains of digests of their blocks; what it evicted meanwhile only
costs a worse choice. No jax.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b

from llmos_jax.serve.request import Request

MOST_BLOCKS = 65_536  # remembered for each replica
BUSY = 2.0  # a replica with so many times the least load (and a few more) is too busy for a prefix to matter
SLACK = 4096  # tokens


class Router:
    """page_size: of the engines, in tokens. Load is counted in tokens of prompts and of answers to come."""

    def __init__(self, num_replicas: int, page_size: int = 32):
        self.page_size = page_size
        self._known: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(num_replicas)]
        self._load = [0] * num_replicas
        self._placed: dict[str, tuple[int, int]] = {}  # id -> (replica, tokens)

    def choose(self, request: Request, usable: list[int]) -> int:
        """One of `usable`; the request counts as its load until `done`."""
        tokens = len(request.prompt) + request.n * request.sampling.max_tokens
        if len(self._known) == 1:
            chosen = usable[0]
        else:
            digests = self._digests(request)
            least = min(self._load[i] for i in usable)
            free = [i for i in usable if self._load[i] <= BUSY * least + SLACK]
            chosen = max(free, key=lambda i: (self._hits(i, digests), -self._load[i]))
            self._remember(chosen, digests)
        self._load[chosen] += tokens
        self._placed[request.id] = (chosen, tokens)
        return chosen

    def done(self, id: str) -> None:
        replica, tokens = self._placed.pop(id, (0, 0))
        self._load[replica] -= tokens

    def _digests(self, request: Request) -> list[bytes]:
        size, digests = self.page_size, []
        digest = repr((request.salt, request.adapter, request.model)).encode()
        for start in range(0, len(request.prompt) - size + 1, size):
            block = array("q", request.prompt[start : start + size]).tobytes()
            digest = blake2b(digest + block, digest_size=16).digest()
            digests.append(digest)
        return digests

    def _hits(self, replica: int, digests: list[bytes]) -> int:
        known = self._known[replica]
        return next((i for i, digest in enumerate(digests) if digest not in known), len(digests))

    def _remember(self, replica: int, digests: list[bytes]) -> None:
        known = self._known[replica]
        for digest in reversed(digests):  # the first block last, so that it is forgotten last
            known[digest] = None
            known.move_to_end(digest)
        while len(known) > MOST_BLOCKS:
            known.popitem(last=False)
