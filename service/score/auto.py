"""`model: auto`: of the models that have been asked about a series, the one whose forecasts were worth most.

Models are compared by CRPS over the naive forecast's absolute error on the same targets, newer blocks weighing more.
The choice is a function of the stored sums: it is made block by block, so that a model must be better by a margin
before it takes over, and made again it is the same.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from service.score.ledger import Blocks
from service.score.standings import Standing

NAIVE: Final = "naive"
_DECAY: Final = 0.9  # of a block's weight with every later one
_BETTER: Final = 0.98  # of the chosen model's score, or it stays
_FEWEST_BLOCKS: Final = 3
_FORGIVEN_BLOCKS: Final = 10


def chosen(blocks: Mapping[str, Blocks], standings: Mapping[str, Standing], newest: int) -> str | None:
    """The best of some models (name@version) for one group of horizons; NAIVE where all are worse than that.

    None where too little was scored. `newest` is the number of the newest block: where nobody has asked a model for
    some time, it is asked again, or the naive forecast would stay for ever.
    """
    best = _best(blocks)
    known = {model: standings[model] for model in blocks if model in standings}
    if best and newest - max(int(blocks[model].numbers[-1]) for model in blocks) <= _FORGIVEN_BLOCKS:
        return NAIVE if all(each.recent.is_worse_than_naive for each in known.values()) else best
    return best


def _best(blocks: Mapping[str, Blocks]) -> str | None:
    totals = {model: np.zeros(2) for model in blocks}
    seen = dict.fromkeys(blocks, 0)
    rows = sorted(
        (number, model, index) for model, each in blocks.items() for index, number in enumerate(each.numbers.tolist())
    )
    best: str | None = None
    for position, (number, model, index) in enumerate(rows):
        sums = blocks[model].sums[index]
        losses = 2 / 3 * (sums["pinball_low"] + sums["error"] / 2 + sums["pinball_high"])
        totals[model] = _DECAY * totals[model] + np.array([losses, sums["naive_error"]])
        seen[model] += 1
        if position + 1 == len(rows) or rows[position + 1][0] != number:  # the block is complete
            best = _next(best, totals, seen)
    return best


def _next(best: str | None, totals: Mapping[str, np.ndarray], seen: Mapping[str, int]) -> str | None:
    scores = {
        model: float(total[0] / total[1])
        for model, total in totals.items()
        if seen[model] >= _FEWEST_BLOCKS and total[1] > 0
    }
    if not scores:
        return best
    leader = min(scores, key=lambda model: scores[model])
    if best is None or best not in scores:
        return leader
    return leader if scores[leader] < _BETTER * scores[best] else best
