"""A run's folder: Parquet shards, tables, pairs and manifests, and what is checked before they are trusted.

Token ids are the truth, texts are for people. A file is whole or absent; nothing here is pickled.
"""
