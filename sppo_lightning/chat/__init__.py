"""``sppo-lightning chat``: talk to a policy in the terminal, or to two of them side by side.

A policy is a run's (of any iteration that is kept, or the one that it started from), a model folder, a hub id, an
adapter's folder or a ``.gguf`` file. Policies that differ by their adapter share one base in memory. Answers are
sampled token by token with the project's own sampler, both policies from the same random numbers, so that what differs
comes from the weights.
"""
