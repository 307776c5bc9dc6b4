"""What happened in a run, for people and for CI: the command ``sppo-lightning report``.

A run's folder is read as it is, also while ``fit`` writes into it: what is missing or damaged is named in the report,
and no link is followed out of the folder. ``summary`` holds everything but the prompts and responses, in plain
containers; JSON is the summary itself, Markdown a part of it, and the page shows it with all prompts and responses.

The page is one file that loads nothing. Its data are compressed, and texts are opened when somebody asks for them.
Prompts and responses are hostile: scripts and styles run by their hash alone, and texts become text nodes.
"""
