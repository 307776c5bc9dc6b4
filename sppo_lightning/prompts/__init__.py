"""Prompts: read from the files that people have, made into token ids by one templating function, held packed."""
