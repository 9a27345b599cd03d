"""Paths as users write them: `~`, `~user`, `$NAME`, `${NAME}` are expanded, `$$` is a dollar; URLs stay as they are."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mvar.errors import ConfigError

_VARIABLE = re.compile(r"\$(\$|[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\})")


def is_url(text: str) -> bool:
    """Whether `gopen` would open this by a scheme (`https:`, `s3:`, `pipe:`, ...) and not as a path."""
    return "://" in text or text.startswith("pipe:")


def expanded(text: str) -> str:
    """What a user means. Raises ConfigError."""
    if is_url(text):
        return text
    if not text:
        raise ConfigError("got nothing, expected a path. (Is a variable of the shell not set?)")

    def value(match: re.Match[str]) -> str:
        name = match[1].strip("{}")
        if name != "$" and not os.environ.get(name):  # With an empty one, $SCRATCH/runs would lie in the root.
            raise ConfigError(f"{text!r}: the environment has no variable {name}. Set it; a dollar itself is $$.")
        return "$" if name == "$" else os.environ[name]

    home = os.path.expanduser(text) if text.startswith("~") else text
    if home.startswith("~"):
        raise ConfigError(f"{text!r}: there is no such user. A file that is called so: ./{text}")
    return _VARIABLE.sub(value, home)


def written(path: str | Path) -> str:
    """A path so that `expanded` gives it back."""
    text = str(path)
    if is_url(text):
        return text
    return ("./" if text.startswith("~") else "") + text.replace("$", "$$")
