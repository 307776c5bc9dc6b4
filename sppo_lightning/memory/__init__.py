"""How much memory a run takes, estimated from its config before any weights load.

Weights are counted on the meta device; a training step runs the package's own forward and backward on fake tensors
and counts what lives; the optimizer steps on a few weights. ``fit`` first takes a generous bound, which costs
nothing, and estimates only where that does not fit; rank 0 answers for all, by the least memory that one of them has.
A model that cannot be estimated is warned about, not refused. Settings are proposed only after estimating with them.
"""
