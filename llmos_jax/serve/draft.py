"""A small model that guesses the next tokens of a large one (speculative decoding, arXiv:2211.17192).

Its keys and values lie in a pool of its own with the same block tables, so whatever the scheduler decides (sharing,
copies, swaps, preemption) holds for both. It guesses greedily: drafts are then accepted with the probability that the
large model gives them, which is exact, and with the same seeds the answer is the same as without drafts.
"""

from llmos_jax.serve.request import Sampling
from llmos_jax.serve.runner import Row, Runner
from llmos_jax.serve.sequence import Sequence
from llmos_jax.serve.step import Chunk, Step

GREEDY = Sampling(1, temperature=0.0)


class DraftModel:
    """runner: of the small model, with the page size, pages and sequences of the large one's."""

    def __init__(self, runner: Runner, num_drafts: int):
        self.runner, self._num_drafts = runner, num_drafts

    def propose(self, sequences: list[Sequence]) -> None:
        """Sets the drafts of sequences that decode: as many as their last page has room for."""
        size = self.runner.serve.page_size
        rooms = {one: min(self._num_drafts, len(one.blocks) * size - len(one.tokens)) for one in sequences}
        drawn = []
        for ahead in range(max(rooms.values(), default=0)):
            # The token of a pass goes into the next one on the device.
            taking = [one for one in sequences if rooms[one] > ahead]
            step = Step([Chunk(one, len(one.tokens) - 1 + ahead, 1, 0, 1) for one in taking])
            rows = [Row(i, GREEDY, 0, 0, slot=one.slot) for i, one in enumerate(taking)]
            drawn.append((taking, self.runner.run(step, rows)))
        drafts: dict[Sequence, list[int]] = {one: [] for one in sequences}
        for taking, found in drawn:
            for one, token in zip(taking, found.tokens(), strict=True):
                drafts[one].append(token)
        for one in sequences:
            one.drafts = drafts[one]

    def follow(self, step: Step) -> None:
        """Computes its own keys and values of a step's tokens, and moves its pages with the large model's."""
        self.runner.run(step, [])
