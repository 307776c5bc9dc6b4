"""The policy: found, loaded, adapted, quantised, sharded, fingerprinted and written; what a model is made of."""
