"""What a training step is made of: micro-batches, optimizer, metrics, the frozen reference, the Trainer's hardware.

- ``pairs_per_step`` is global, ``batch_size`` is one micro-batch on one device; accumulation follows, and sizes that
  do not divide are an error. One global order of pairs: step s takes ``pairs_per_step`` of them. Inside a step pairs
  of similar length go together, longest first, dealt to the ranks in turn. The last step may be partial; its loss is
  divided by its true count (``batching``).
- The learning rate is a function of (step in the iteration, steps of the iteration). The optimizer's state is freed
  after an iteration's last step, unless ``carry_optimizer`` keeps it (``optimizers``).
- The reference ``previous_iteration`` is the policy before its first step, so that no second model exists;
  ``initial`` is the adapter switched off, or the adapter's first weights swapped in for the pass; with full
  fine-tuning the initial weights are read again and freed (``reference``).
- What a loss reads comes with the batch; a loss that needs no reference has none computed.
"""
