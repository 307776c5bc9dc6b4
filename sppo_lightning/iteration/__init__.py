"""One self-play iteration, from schedule to pairs with reference log-probs. Never sees a Trainer.

- Everything lands in the iteration's folder as it comes; a second call resumes where the first one stopped.
- Rollouts belong to one policy: the manifest holds the fingerprint of the weights that answered, taken before the
  first shard. A missing folder of an iteration that was trained on is an error, never sampled again.
- A probe is not wasted: same policy, so that its responses count towards those of the prompts that get selected.
  ``difficulty.parquet`` is written before the top-up; what the top-up adds counts from the next iteration on.
- in = out + dropped, by reason: ``too_long``, ``not_scheduled``, ``not_selected``, ``non_finite_reward`` (or what
  else left a prompt without usable responses), ``tied_rewards``, ``identical_responses``, ``pair_not_selected``.
- A checkpoint says how many pairs of which iteration are consumed, whatever the number of processes or the size of a
  micro-batch (``state``).
"""
