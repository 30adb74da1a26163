"""Who is next: waiting sequences by priority, then tenants by what they were served, then deadline, then arrival. No jax.

Tenants share by the virtual token counter (Sheng et al., "Fairness in Serving Large Language Models",
arXiv:2401.00588): a tenant's counter grows by a weight for each token it is served, the tenant of the smallest counter
goes next, and one that comes back to the queue is lifted to the smallest counter there, so that no claim is saved up
while idle.
"""

from collections.abc import Iterator, Set
from heapq import heapify, heappop, heappush, heapreplace
from math import inf

from llmos_jax.serve.sequence import Sequence

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2  # of a token, as in the paper and in what providers charge
MOST_IDLE = 10_000  # tenants whose counters are kept while they ask for nothing

Rank = tuple[bool, float, float, int]  # within a tenant: not to the front, deadline, arrival, serial number


class Line:
    """The waiting sequences of one tenant and priority. Those that finished meanwhile are dropped when they are met."""

    __slots__ = ("entry", "heap", "live", "priority", "tenant")

    def __init__(self, tenant: str, priority: int):
        self.tenant, self.priority = tenant, priority
        self.heap: list[tuple[Rank, Sequence]] = []
        self.live = 0
        self.entry: tuple[int, Rank, Line] | None = None  # its valid place among the lines of its priority

    def compact(self) -> None:
        """Forgets what finished: the head at least, and all of it before it is most of the heap."""
        heap = self.heap
        if len(heap) > 2 * self.live + 16:
            heap[:] = [item for item in heap if item[1].finish is None]
            heapify(heap)
        while heap and heap[0][1].finish is not None:
            heappop(heap)


class FairQueue:
    """All waiting sequences. Operations cost O(log waiting), and O(tenants served since) where counters moved.

    served: virtual token counter of each tenant, but of those that `forget` dropped. Heaps hold keys as they were when
    pushed; since ranks and counters only grow, or are pushed anew when a rank falls, the smallest key that is up to date
    is the smallest.
    """

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        self._lines: dict[int, dict[str, Line]] = {}  # priority -> tenant -> line
        self._orders: dict[int, list[tuple[int, Rank, Line]]] = {}  # priority -> heap of the lines
        self._aside: list[Line] = []
        self._waiting: dict[str, int] = {}  # tenant -> sequences
        self._least: list[tuple[int, str]] = []  # heap of the tenants in the queue, by counter
        self._listed: set[str] = set()  # the tenants in it
        self._last = 0  # counter of the tenant that left the queue last
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._crowd = 64  # so many counters are worth a look at who is idle
        self._serial = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def charge(self, tenant: str, amount: int) -> None:
        self.served[tenant] += amount

    @property
    def is_crowded(self) -> bool:
        """Whether there are so many counters that `forget` is due; it is rarely, so that it costs O(1) for each."""
        return len(self.served) > self._crowd

    def forget(self, running: Set[str]) -> None:
        """Drops counters of tenants that neither wait nor are `running`.

        One at or below the floor would be lifted there on its return, like a newcomer: nothing changes by forgetting it.
        Of those above, `MOST_IDLE` are kept, the largest counters: what a tenant gains by being forgotten is its excess
        over the floor.
        """
        floor = self._floor()
        idle = [name for name in self.served if name not in self._waiting and name not in running]
        ahead = sorted((name for name in idle if self.served[name] > floor), key=self.served.__getitem__)
        for name in {*idle}.difference(ahead[-MOST_IDLE:]):
            del self.served[name]
        self._listed = set(self._waiting)
        self._least = [(self.served[name], name) for name in self._listed]
        heapify(self._least)
        self._crowd = 2 * len(self.served) + 64

    def push(self, sequence: Sequence, front: bool = False) -> None:
        """Queues it; front: before those of its tenant and priority that have not begun."""
        request = sequence.request
        tenant, priority = request.tenant, request.priority
        self._join(tenant)
        line = self._lines.setdefault(priority, {}).get(tenant)
        if line is None:
            line = self._lines[priority][tenant] = Line(tenant, priority)
        self._serial += 1
        deadline = inf if request.deadline is None else request.deadline
        heappush(line.heap, ((not front, deadline, request.arrival, self._serial), sequence))
        line.live += 1
        self._length += 1
        line.compact()
        if line not in self._aside and line.heap[0][1] is sequence:
            self._place(line)
        if request.deadline is not None and not front:
            heappush(self._deadlines, (deadline, self._serial, sequence))

    def peek(self) -> Sequence | None:
        """The next one, None where nobody waits but those set aside."""
        for priority in sorted(self._orders):
            order = self._orders[priority]
            while order:
                entry = order[0]
                line = entry[2]
                if line.entry is not entry:
                    heappop(order)
                    continue
                line.compact()
                if (self.served[line.tenant], line.heap[0][0]) == entry[:2]:
                    return line.heap[0][1]
                line.entry = (self.served[line.tenant], line.heap[0][0], line)
                heapreplace(order, line.entry)
        return None

    def pop(self, sequence: Sequence) -> None:
        """Takes out what `peek` returned."""
        line = self._lines[sequence.request.priority][sequence.request.tenant]
        heappop(line.heap)
        self._leave(line)
        if line.live:
            line.compact()
            self._place(line)

    def discard(self, sequence: Sequence) -> None:
        """Takes out a sequence that has finished, wherever it waits."""
        self._leave(self._lines[sequence.request.priority][sequence.request.tenant])

    def set_aside(self, sequence: Sequence) -> None:
        """Passes over the line of what `peek` returned, until `restore`."""
        line = self._lines[sequence.request.priority][sequence.request.tenant]
        line.entry = None
        self._aside.append(line)

    def restore(self) -> None:
        for line in self._aside:
            if line.live:
                line.compact()
                self._place(line)
        self._aside.clear()

    def expired(self, now: float) -> Iterator[Sequence]:
        """Those that have not begun before their deadline. The caller finishes and discards each before the next."""
        heap = self._deadlines
        if len(heap) > 2 * self._length + 16:
            heap[:] = [item for item in heap if waits(item[2])]
            heapify(heap)
        while heap and heap[0][0] <= now:
            sequence = heappop(heap)[2]
            if waits(sequence):
                yield sequence

    def _place(self, line: Line) -> None:
        line.entry = (self.served[line.tenant], line.heap[0][0], line)
        heappush(self._orders.setdefault(line.priority, []), line.entry)

    def _leave(self, line: Line) -> None:
        line.live -= 1
        self._length -= 1
        self._waiting[line.tenant] -= 1
        if not self._waiting[line.tenant]:
            del self._waiting[line.tenant]
            self._last = self.served[line.tenant]
        if line.live:
            return
        line.entry = None
        lines = self._lines[line.priority]
        del lines[line.tenant]
        if not lines:
            del self._lines[line.priority]
            self._orders.pop(line.priority, None)

    def _join(self, tenant: str) -> None:
        """Counts one more of this tenant; one that was not in the queue is lifted to the least counter there."""
        if tenant in self._waiting:
            self._waiting[tenant] += 1
            return
        self.served[tenant] = max(self.served.get(tenant, 0), self._floor())
        self._waiting[tenant] = 1
        if tenant not in self._listed:
            self._listed.add(tenant)
            heappush(self._least, (self.served[tenant], tenant))

    def _floor(self) -> int:
        """The least counter in the queue, or of the tenant that left it last; it never falls."""
        heap = self._least
        while heap:
            counter, tenant = heap[0]
            if tenant not in self._waiting:
                heappop(heap)
                self._listed.discard(tenant)
            elif self.served[tenant] != counter:
                heapreplace(heap, (self.served[tenant], tenant))
            else:
                return counter
        return self._last


def waits(sequence: Sequence) -> bool:
    """Whether it has neither begun nor finished."""
    return sequence.finish is None and sequence.slot < 0 and not sequence.preemptions
