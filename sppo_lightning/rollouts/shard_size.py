"""How many prompts a rollout file holds: the unit of work and of recovery."""

from __future__ import annotations

import math

FEWEST_RESPONSES, MOST_RESPONSES = (
    128,
    2048,
)  # what fills a batch of an engine; what is little to lose at a kill
MOST_TOKENS = 2**21  # some ten MB on disk, and some ten times that as objects while a shard is made


def prompts_per_shard(prompts: int, samples: int, *, max_new_tokens: int) -> int:
    """Return how many prompts a shard takes, so that there are about as many shards as responses in each.

    The shards of a run that is started again must be those of its first start: this depends on nothing that may
    change between the two, such as the number of processes or the size of a batch.

    Args:
        prompts: of the phase.
        samples: most responses of one of them.
        max_new_tokens: the longest response.
    """
    balanced = math.isqrt(prompts * samples)
    most = min(MOST_RESPONSES, MOST_TOKENS // max_new_tokens)
    return max(1, min(max(balanced, FEWEST_RESPONSES), most) // samples)
