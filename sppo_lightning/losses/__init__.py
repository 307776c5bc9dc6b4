"""Preference losses: pure functions of a pair's log-probs, lengths and rewards; chosen by ``model.loss``.

The loss of a pair depends on that pair only, never on its batch, so that gradient accumulation and the number of
processes change nothing. What a loss may read is in :class:`LossInputs`; its attributes say what it needs, and without
need of a reference no reference pass is made.
"""

from sppo_lightning.losses.combined import CombinedLoss, LengthRegularization
from sppo_lightning.losses.divergence import (
    AlphaDivergence,
    Divergence,
    FDivergenceDPOLoss,
    ForwardKL,
    JensenShannon,
)
from sppo_lightning.losses.dpo import DPOLoss, DPOPLoss, LDDPOLoss, RobustDPOLoss, dpo_loss
from sppo_lightning.losses.margin import DiscoPOPLoss, EXOPairLoss, HingeLoss, REBELLoss, SummedIPOLoss
from sppo_lightning.losses.per_token import ChosenNLL, IPOLoss, LengthNormalizedDPOLoss, ORPOLoss, SimPOLoss
from sppo_lightning.losses.pointwise import (
    APODownLoss,
    APOZeroLoss,
    KTOPairLoss,
    NCAPairLoss,
    SPPOLoss,
    SPPOSoftLoss,
)
from sppo_lightning.losses.protocol import (
    LossInputs,
    PairLogps,
    PairValues,
    PreferenceLoss,
    PreferenceTerms,
)
from sppo_lightning.losses.weighted import (
    AlignedPolicyConfidence,
    PolicyConfidence,
    RewardGap,
    WeightedLoss,
    Weighting,
)

__all__ = [
    "APODownLoss",
    "APOZeroLoss",
    "AlignedPolicyConfidence",
    "AlphaDivergence",
    "ChosenNLL",
    "CombinedLoss",
    "DPOLoss",
    "DPOPLoss",
    "DiscoPOPLoss",
    "Divergence",
    "EXOPairLoss",
    "FDivergenceDPOLoss",
    "ForwardKL",
    "HingeLoss",
    "IPOLoss",
    "JensenShannon",
    "KTOPairLoss",
    "LDDPOLoss",
    "LengthNormalizedDPOLoss",
    "LengthRegularization",
    "LossInputs",
    "NCAPairLoss",
    "ORPOLoss",
    "PairLogps",
    "PairValues",
    "PolicyConfidence",
    "PreferenceLoss",
    "PreferenceTerms",
    "REBELLoss",
    "RewardGap",
    "RobustDPOLoss",
    "SPPOLoss",
    "SPPOSoftLoss",
    "SimPOLoss",
    "SummedIPOLoss",
    "WeightedLoss",
    "Weighting",
    "dpo_loss",
]
