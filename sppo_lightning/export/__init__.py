"""A run's policy as a folder that leaves the project whole: the command ``sppo-lightning export``."""
