"""The training of the transformer, below its command."""
