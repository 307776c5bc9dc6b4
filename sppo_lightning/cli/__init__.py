"""The command line: LightningCLI's wiring, checks of the config, one-line errors. No logic of the loop."""
