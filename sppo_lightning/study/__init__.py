"""Studies: arms that differ in a few settings, over seeds, under one protocol, with claims named before they run.

- ``definition``: the study file, and what it refuses.
- ``sweep``: a study of one setting's values, made from a config of ``fit``.
- ``plan``: the runs that it stands for, each one ``fit`` with a config of its own.
- ``sizes``: refuses arms that have fewer pairs than an optimizer step takes.
- ``runner``: runs them one after the other, or a job's share of them; killed and started again it continues.
- ``outcomes``: the held-out rewards of the runs that have ended, prompt by prompt.
- ``statistics``: paired comparison over seeds and prompts (variance components), effect sizes, Holm's correction, the
  power of a comparison.
- ``verdicts``: what the claims came to.
- ``quartiles``: held-out prompts by difficulty.
- ``dynamics``: what the pairs do in training.
- ``agreement``: how far difficulties agree, from what ``probes`` reads; ``correlation``: Spearman with an interval.
- ``choice``: the best arm, and what choosing it is worth, with the winner's bias corrected.
- ``sweep_page``: what the page of a sweep says first.
- ``page``: tables, figure and the page that reads as a result.

The policy that all arms of a seed start from answers once: see
:class:`~sppo_lightning.generation.CachedGenerator`. Arms take equally many optimizer steps through
``data.steps_per_iteration``.
"""
