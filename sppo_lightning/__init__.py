"""Self-play preference optimisation on PyTorch Lightning, driven by prompt difficulty."""

__version__ = "0.1.0"
