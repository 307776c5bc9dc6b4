"""Whether and where an interrupted run resumes.

- What a run has generated, scored and referenced lies in the store; what it has trained lies in
  ``checkpoints/last.ckpt``, written between two optimizer steps. A resumed run starts before the epoch that was under
  way, and the loader hands out the rest of its steps; where none is left, one batch without pairs, so that Lightning
  moves on to the evaluation (``position``).
- A run folder made with another config is an error that names the key; what decides speed, place or display may
  change (``run_config``).
- A checkpoint's checksums are compared before it is loaded; of a sharded one, the sizes of its shards
  (``checkpoints``).
- ``metrics.csv`` has neither gaps nor repeats: the checkpoint knows how many rows there were, later ones give way
  (``metrics_csv``).
"""
