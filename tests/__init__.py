import mvar  # noqa: F401  Sets how threads wait, before a test loads torch.
