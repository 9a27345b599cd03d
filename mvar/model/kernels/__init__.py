"""The arithmetic of Mamba-2: in torch, and through the kernels of mamba-ssm."""
