"""The main of a training's command on every rank: one message for one mistake, and an end that ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from mvar.cli import show_error
from mvar.errors import EXIT_FAULT, EXIT_FINISHED, EXIT_USER_ERROR, HardwareFaultError, MvarError
from mvar.log import log, rank_hint
from mvar.run import world as worlds
from mvar.run.world import RemoteError, World

C = TypeVar("C")


def run_training(prepare: Callable[[], C | None], join: Callable[[C], World], train: Callable[[C, World], int]) -> int:
    """Exit code of a command that trains. A process of several does not return where it has joined the others.

    `prepare`: the configuration, the same on every rank, or None where nothing is to be trained; `join`: the other
    processes. Raises MvarError, for `run_command` to show, where nobody else has shown it.
    """
    try:
        config = prepare()
    except MvarError:
        if rank_hint(os.environ) == 0:
            raise
        return EXIT_USER_ERROR  # The same on every rank; one message is enough.
    if config is None:
        return EXIT_FINISHED
    world = join(config)
    if world.size == 1:
        try:
            return train(config, world)
        except MvarError:
            raise
        except HardwareFaultError as error:
            log.critical("%s", error)
            return EXIT_FAULT
        except Exception:
            log.critical("this process fails", exc_info=True)
            return EXIT_FAULT
        finally:
            worlds.finish()
    try:
        code = train(config, world)
    except RemoteError as error:
        log.warning("%s", error)
        code = EXIT_USER_ERROR if error.expected else EXIT_FAULT
    except MvarError as error:
        code = show_error(error)
    except HardwareFaultError as error:  # All ranks know of it.
        log.critical("%s", error)
        code = EXIT_FAULT
    except Exception:
        # At once and without goodbyes: the other ranks learn of it when this one is gone.
        log.critical("this rank fails", exc_info=True)
        _end(EXIT_FAULT)
    worlds.finish()
    return _end(code)


def _end(code: int) -> NoReturn:
    """All is written and closed. The interpreter's own end now and then aborts in a thread of torch's."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
