"""Prompts: read from the files that people have, made into token ids by one templating function, held packed.

At most one BOS opens a prompt. An over-long prompt is dropped before generation and listed, never truncated.
"""
