"""`python -m mvar.plan`."""

from mvar.cli import run_command
from mvar.plan.command import main

raise SystemExit(run_command(main))
