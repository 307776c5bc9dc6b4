"""A run's folder: Parquet shards, tables, pairs and manifests, and what is checked before they are trusted.

- Token ids are the truth, texts are for people. Nothing here is pickled.
- Rollouts stream: shards are written as they are made, statistics read their columns, pairing joins probe and top-up
  shards prompt by prompt. Prompts and pairs are held packed, four bytes a token; a row becomes an object, and a text
  or its tokens are read, where they are asked for.
- A manifest has a digest and says what made its iteration: policy, settings, seed, counts, drops by reason.
- What can be made anew is quarantined as ``<name>.damaged`` with a warning: shards, pairs and difficulties of an
  iteration that has not been trained on, and held-out answers of a policy that is still at hand. All else that is
  damaged or gone is an error that names the file, and changes nothing. A disk that cannot be read says nothing about
  its files: that is an error too (``integrity``).
- ``data.keep_iterations`` deletes the responses of older iterations once the checkpoint after them is on disk. The
  manifest says ``pruned`` before the first file goes; manifest, difficulties and pairs stay (``pruning``).
"""
