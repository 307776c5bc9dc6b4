"""Log-probs of preference pairs, for training and reference alike; chosen by ``model.pair_forward``."""

from sppo_lightning.pair_forward.forwards import (
    AutoForward,
    PairForward,
    PlainForward,
    SharedForward,
    VarlenForward,
)

__all__ = ["AutoForward", "PairForward", "PlainForward", "SharedForward", "VarlenForward"]
