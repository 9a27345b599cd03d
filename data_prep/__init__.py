"""Images to code stores."""

import mvar  # noqa: F401  Says how threads wait, before a command of this package loads torch.
