"""``sppo-lightning watch``: a run in the terminal while it grows, or when it is done.

What is shown is read from the run's folder alone, once a second, and only what has changed; nothing is written there,
and no lock is taken. A file that is damaged or not there yet is said, and the rest is shown. The screen is Textual's,
which the extra ``watch`` installs; without a terminal one report is printed.
"""
