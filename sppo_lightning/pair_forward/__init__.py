"""Log-probs of preference pairs, for training and reference alike; chosen by ``model.pair_forward``.

A micro-batch is one row of tokens without padding: all prompts, then all responses, whose positions continue after
their prompt. The model's attention function is replaced by one that knows the row's segments (a response sees its
prompt and itself); it is an argument of the model's forward, so that recomputed layers have it too, and the model
gets its own attention back before anything else uses it. Hidden states are taken where response tokens are predicted;
the model's own forward, its decoder skipped, makes logits of them, a chunk at a time. Which forward serves is decided
once, by a parity check against the model's own logits, and all processes agree.
"""

from sppo_lightning.pair_forward.forwards import (
    AutoForward,
    PairForward,
    PlainForward,
    SharedForward,
    VarlenForward,
)

__all__ = ["AutoForward", "PairForward", "PlainForward", "SharedForward", "VarlenForward"]
