"""Which prompts an iteration sees, which of them it trains on, and in what order.

Three kinds of rule, each chosen in the config by ``class_path``:

- schedule: the candidate prompts of an iteration, before anything is sampled;
- selection: the prompts (or pairs) to keep, from a table of statistics;
- curriculum: the order of the pairs inside an iteration.

Every rule is deterministic and permutation-equivariant: ties and random choices are settled by a key derived
from (seed, iteration, prompt id), and from a number where a prompt has several pairs. A rule may keep a state, and may
learn from each iteration's probe (``Rule.observe``). Every rule has a control of its own size: ``RandomFraction``,
``MatchedRandom``, ``RandomSubset``, ``MatchedRandomSubset``.
"""

from sppo_lightning.selection.adaptive_schedules import AdaptiveTarget, CategoryBandit
from sppo_lightning.selection.contract import Curriculum, Rule, Schedule, Selection
from sppo_lightning.selection.curricula import EasyToHard, HardToEasy, RandomOrder
from sppo_lightning.selection.overlap import jaccard, overlaps
from sppo_lightning.selection.pair_rules import (
    RIP,
    AllPairs,
    HighestPerplexity,
    LargestLogpMargin,
    LowestPerplexity,
    RIPThresholds,
    SmallestLogpMargin,
)
from sppo_lightning.selection.pool_schedules import DifficultyPools, SkipTied
from sppo_lightning.selection.prompt_rules import (
    All,
    Band,
    DropHardest,
    Easiest,
    Hardest,
    HighestLearnability,
    HighestPVar,
    HighestRewardGap,
    HighestRewardStd,
    RewardBand,
)
from sppo_lightning.selection.schedules import AllPrompts, DisjointSplits, MatchedRandomSubset, RandomSubset
from sppo_lightning.selection.shares import Fraction, HighestShare, LowestShare, RandomFraction
from sppo_lightning.selection.wrappers import AllOf, MatchedRandom, PerCategory

__all__ = [
    "RIP",
    "AdaptiveTarget",
    "All",
    "AllOf",
    "AllPairs",
    "AllPrompts",
    "Band",
    "CategoryBandit",
    "Curriculum",
    "DifficultyPools",
    "DisjointSplits",
    "DropHardest",
    "Easiest",
    "EasyToHard",
    "Fraction",
    "HardToEasy",
    "Hardest",
    "HighestLearnability",
    "HighestPVar",
    "HighestPerplexity",
    "HighestRewardGap",
    "HighestRewardStd",
    "HighestShare",
    "LargestLogpMargin",
    "LowestPerplexity",
    "LowestShare",
    "MatchedRandom",
    "MatchedRandomSubset",
    "PerCategory",
    "RIPThresholds",
    "RandomFraction",
    "RandomOrder",
    "RandomSubset",
    "RewardBand",
    "Rule",
    "Schedule",
    "Selection",
    "SkipTied",
    "SmallestLogpMargin",
    "jaccard",
    "overlaps",
]
