"""The policy: found, loaded, adapted, quantised, sharded, fingerprinted and written; what a model is made of.

- Trained weights are float32; full fine-tuning in 16 bits is refused. Responses are sampled from a copy in the
  compute dtype, made once a phase and freed; log-probs never come from that copy.
- An adapter's base is held once, frozen, in 4 or 8 bits or in the compute dtype; its embeddings, head and norms are
  never quantised. Samples, reference and training read the same policy, the adapter on that base. Merging happens in
  ``export`` alone, into the base as its own files have it, one weight at a time in float32, rounded once.
- Under ``ModelParallelStrategy`` weights, gradients and optimizer states are sharded (FSDP2). Rank 0 reads the model
  into host memory and hands it on weight by weight; the others start from a meta-device model. Every forward is a
  collective. Weights are gathered in the dtype they are held in and autocast casts them, so that log-probs are those
  of unsharded weights to the bit. Nothing is sampled from shards: before a phase the policy is written in the compute
  dtype into ``.sampling/``, from which processes that sample read an unsharded one, or hand it to a server.
- Fingerprints are those of unsharded weights.
- Parts of a multimodal model that text never passes through are frozen, get no fresh adapter, and are written as they
  were.
"""
