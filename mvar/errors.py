"""The errors that a user can cause, and the exit codes of commands."""

EXIT_FINISHED = 0
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""Stopped on purpose, with a checkpoint saved: run the same command again."""


class MvarError(Exception):
    """A user's mistake or a broken input. The message says what was wrong, where, and what to do; exit code 2."""


class ConfigError(MvarError):
    """A configuration that cannot be run."""


class WriteError(MvarError):
    """A file or folder that cannot be written: no room, no permission, or a disk that fails."""


class StoreError(MvarError):
    """A code store that is missing, damaged, incomplete, or made for another model."""


class ImageError(MvarError):
    """An image or image folder that cannot be read."""


class TokenizerError(MvarError):
    """A tokenizer file that is damaged or has another geometry."""


class CheckpointError(MvarError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class TrainingError(MvarError):
    """A training that cannot go on, such as one that diverged."""


class BackendError(MvarError):
    """A compute backend asked for by name that this machine does not have."""


class HardwareFaultError(Exception):
    """A machine that computes wrong: nobody's mistake, so no MvarError. Exit code 1: a chain of jobs starts again."""
