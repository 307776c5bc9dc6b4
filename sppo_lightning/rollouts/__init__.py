"""Responses sampled and scored, shard by shard. Never sees a Trainer."""
