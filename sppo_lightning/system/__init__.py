"""What a run asks of its machine: files that are whole or absent, locks, signals, processes, servers, device memory.

Knows nothing of prompts, models or training; imports ``types`` alone.
"""
