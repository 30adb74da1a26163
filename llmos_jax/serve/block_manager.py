"""Pages of the KV cache as the host keeps them: who holds which block, and which blocks are worth keeping. No jax.

A block is referenced (in some sequence's block table), cached (nobody's, but its content may serve a later prompt) or
free. Every operation costs O(1) a block, however many there are.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b

from llmos_jax.serve.request import Request
from llmos_jax.serve.sequence import Sequence

DIGEST_BYTES = 16


def root_digest(request: Request) -> bytes:
    """What the chain of digests of its blocks begins with: the same for requests that may share pages only.

    The keys and values of a token depend on the model and the adapter; the salt keeps tenants apart.
    """
    return blake2b(repr((request.salt, request.adapter, request.model)).encode(), digest_size=DIGEST_BYTES).digest()


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens on the device, and `num_host_blocks` on the host to swap to.

    The prefix cache is a chain of hashes: the digest of a full block covers its tokens and the digest of the block
    before it, so that equal digests mean equal prefixes. Of blocks that nobody references, the least recently used is
    overwritten first, and of one sequence its last.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and block_size={block_size} must be at least 1")
        self.num_blocks, self.block_size, self.num_host_blocks = num_blocks, block_size, num_host_blocks
        self.references = [0] * num_blocks
        self.pages: dict[str, int] = {}  # tenant -> entries in its block tables; a shared block counts for each holder
        self.free_host = list(range(num_host_blocks - 1, -1, -1))
        self._free = list(range(num_blocks - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached, nobody's; the least recently used first
        self._digests: list[bytes | None] = [None] * num_blocks  # of what is in a full block
        self._cache: dict[bytes, int] = {}
        self._queries = self._hits = self._evictions = 0

    @property
    def available(self) -> int:
        """How many blocks can be taken."""
        return len(self._free) + len(self._unused)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def stats(self) -> dict[str, int]:
        """Blocks: free + cached + used is all of them. Hits and queries are in tokens."""
        free, cached = len(self._free), len(self._unused)
        return {
            "blocks": self.num_blocks,
            "free": free,
            "cached": cached,
            "used": self.num_blocks - free - cached,
            "host_blocks": self.num_host_blocks,
            "host_used": self.num_host_blocks - len(self.free_host),
            "hits": self._hits,
            "queries": self._queries,
            "evictions": self._evictions,
        }

    # Block tables.

    def extend(self, sequence: Sequence, num_blocks: int) -> None:
        """Adds blocks of undefined content to its table. The caller has seen that so many are available."""
        free = self._free
        while len(free) < num_blocks:
            self._evict()
        taken = free[len(free) - num_blocks :]
        del free[len(free) - num_blocks :]
        references = self.references
        for block in taken:
            references[block] = 1
        sequence.blocks += reversed(taken)
        self._count(sequence, num_blocks)

    def share(self, sequence: Sequence, blocks: list[int]) -> None:
        """Adds blocks that are in use or cached to its table. They are full: nobody writes to them any more."""
        for block in blocks:
            if not self.references[block]:
                del self._unused[block]
            self.references[block] += 1
        sequence.blocks += blocks
        self._count(sequence, len(blocks))

    def release(self, sequence: Sequence) -> None:
        """Gives back its blocks and host blocks. What of them is in the prefix cache stays until it is overwritten."""
        references, digests = self.references, self._digests
        for block in reversed(sequence.blocks):
            references[block] -= 1
            if references[block]:
                continue
            digest = digests[block]
            if digest is not None and self._cache.setdefault(digest, block) == block:
                self._unused[block] = None
            else:
                digests[block] = None
                self._free.append(block)
        self._count(sequence, -len(sequence.blocks))
        sequence.blocks = []
        self.free_host += sequence.swapped
        sequence.swapped = []

    def _count(self, sequence: Sequence, change: int) -> None:
        tenant = sequence.request.tenant
        pages = self.pages.get(tenant, 0) + change
        if pages:
            self.pages[tenant] = pages
        else:
            self.pages.pop(tenant, None)

    def _evict(self) -> None:
        block, _ = self._unused.popitem(last=False)
        digest = self._digests[block]
        assert digest is not None
        del self._cache[digest]
        self._digests[block] = None
        self._free.append(block)
        self._evictions += 1

    # The prefix cache.

    def lookup(self, sequence: Sequence) -> list[int]:
        """The cached blocks of its longest known prefix, never all its tokens: the last one has to be computed."""
        blocks: list[int] = []
        for i in range((len(sequence.tokens) - 1) // self.block_size):
            block = self._cache.get(self._digest(sequence, i))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_lookup(self, num_tokens: int, num_hits: int) -> None:
        """Counts a lookup that was acted upon, in tokens."""
        self._queries += num_tokens
        self._hits += num_hits

    def num_unused(self, blocks: list[int]) -> int:
        """How many of `blocks` are cached only, so that sharing them makes fewer available."""
        return sum(not self.references[block] for block in blocks)

    def register(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes its full blocks among the first `num_tokens` tokens known: they are computed and final."""
        blocks, digests = sequence.blocks, self._digests
        first = full = num_tokens // self.block_size
        while first and digests[blocks[first - 1]] is None:
            first -= 1
        for i in range(first, full):
            digest = digests[blocks[i]] = self._digest(sequence, i)
            self._cache.setdefault(digest, blocks[i])

    def _digest(self, sequence: Sequence, i: int) -> bytes:
        """Of block i and everything before it. Kept with the sequence, so that a token is hashed once."""
        known, size = sequence.digests, self.block_size
        while len(known) <= i:
            start = len(known) * size
            digest = blake2b(known[-1] if known else root_digest(sequence.request), digest_size=DIGEST_BYTES)
            digest.update(array("q", sequence.tokens[start : start + size]).tobytes())
            known.append(digest.digest())
        return known[i]

    def forget(self) -> None:
        """Empties the prefix cache of blocks that nobody references: their content is lost."""
        while self._unused:
            self._evict()

    # Swapping.

    def swap_out(self, sequence: Sequence, num_blocks: int) -> list[tuple[int, int]]:
        """Moves its first blocks to the host and gives back all its blocks; the copies to make, (block, host block)."""
        host = [self.free_host.pop() for _ in range(num_blocks)]
        copies = list(zip(sequence.blocks, host, strict=False))
        self.release(sequence)
        sequence.swapped = host
        return copies

    def swap_in(self, sequence: Sequence) -> list[tuple[int, int]]:
        """The copies, (host block, block), that bring its content back to the first blocks of its new table."""
        copies = list(zip(sequence.swapped, sequence.blocks, strict=False))
        self.free_host += sequence.swapped
        sequence.swapped = []
        return copies
