"""The arithmetic of the model: which products run in which type, and Mamba-2 in torch and through mamba-ssm."""
