"""The state of a training on disk: written, chosen, read, and exchanged."""
