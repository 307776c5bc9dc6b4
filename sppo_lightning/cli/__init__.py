"""The command line: LightningCLI's wiring, checks of the config, one-line errors. No logic of the loop.

Another value for a key that the loop derives (``trainer.max_epochs`` and its like) is an error that names the key to
set. A run folder, its config and its checkpoint are looked at before a Trainer or logger exists.
"""
