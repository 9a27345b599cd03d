"""One run: who takes part, where it is, and what is written down about it."""
