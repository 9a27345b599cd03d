"""Training the tokenizer: its losses, its discriminator, its codebook in use, its state on disk."""
