"""Held-out answers, and what is measured on them."""
