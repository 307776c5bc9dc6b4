"""What is asked before an interrupted run is resumed, and what it is resumed from."""
