"""What a run takes of its device: estimated before anything loads, and measured while it runs."""
