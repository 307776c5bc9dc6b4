"""Held-out answers, and what is measured on them.

An evaluation's manifest holds the policy's fingerprint and a digest of prompts, generator and reward. Outside ``fit``
nothing stored is replaced by another policy's answers. A comparative reward compares held-out answers with the
initial policy's.
"""
