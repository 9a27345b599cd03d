"""Models as folders for others: the layout that `mvar export --to hub` writes, and what reads it."""
