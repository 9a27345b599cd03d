#!/bin/bash
# MVAR_LAUNCH of the tests: the same command, with tests.slurm.paced in the place of mvar.train. On the node named by
# TEST_BAD_NODE the command dies instead, like one on a machine with a broken GPU.
if [ "$(hostname)" = "${TEST_BAD_NODE:-}" ]; then
  date +%s >>"$TEST_DEATHS"
  kill -9 $$
fi
export PYTHONPATH=$PYTHONPATH:$MVAR_HOME
exec "${@/#mvar.train/tests.slurm.paced}"
