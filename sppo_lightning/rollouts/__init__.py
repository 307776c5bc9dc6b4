"""Responses sampled and scored, shard by shard. Never sees a Trainer.

- A shard is a fixed list of prompts, one Parquet file, first written without rewards, then rewritten with them. Ranks
  take whole shards; a run that is started again makes only the missing ones. How many prompts a shard takes follows
  from what the phase asks for, never from what may change between two starts.
- A response that cannot be used is dropped alone, under a named reason that the store keeps. More failures than
  ``max_failed_share`` of a phase are an error.
"""
