"""How much memory a run takes, estimated from its config before any weights load."""
