"""One module per claim. Each prints a ratio against a named baseline; `--json FILE` writes the same for machines."""
