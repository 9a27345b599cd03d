"""Images to code stores."""

import mvar  # noqa: F401  Sets how threads wait, before torch is loaded.
