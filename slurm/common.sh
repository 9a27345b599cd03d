# shellcheck shell=bash
# Sourced by the batch scripts, which set MVAR_HOME: the folder that slurm/ lies in, usually the checkout. Gives them JOB
# (the job as Slurm's commands take it), MVAR_PYTHON, the times that Slurm forgets to tell, and the functions below. A
# site's own settings come from MVAR_SITE, by default slurm/site.env there.

# A job that is submitted from inside of another one inherits all of that one's SLURM_ variables that Slurm does not set for
# it: how a step was bound to cores, three ways of counting memory of which srun takes one, the numbers of an array, the
# time at which the other job has to end. The first go, before a site says what it wants; the others are asked of Slurm.
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" "${!SLURM_MEM_PER_@}" "${!SLURM_STEP@}" "${!SLURM_SRUN_COMM_@}" \
  SLURM_LAUNCH_NODE_IPADDR SLURM_EXACT SLURM_OVERLAP SLURM_WHOLE SLURM_TIMELIMIT SLURM_WAIT SLURM_MULTI_PROG
truth=$(timeout 30 scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | grep "^JobId=$SLURM_JOB_ID ") || truth=
# told NAME: what Slurm says of this job.
told() { [[ $truth =~ \ $1=([^ ]+) ]] && echo "${BASH_REMATCH[1]}"; }
if [ -n "$truth" ]; then
  told ArrayJobId >/dev/null || unset "${!SLURM_ARRAY_@}"
  SLURM_RESTART_COUNT=$(told Restarts) && export SLURM_RESTART_COUNT
  # Older versions tell a job neither when it began nor when it has to end.
  unset SLURM_JOB_START_TIME SLURM_JOB_END_TIME
  if began=$(told StartTime) && began=$(date -d "$began" +%s 2>/dev/null); then export SLURM_JOB_START_TIME=$began; fi
  if ends=$(told EndTime) && ends=$(date -d "$ends" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$ends; fi
fi

JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}

say() { echo "$(date '+%F %T') $SLURM_JOB_NAME $JOB: $*"; }
fail() {
  say "error: $*" >&2
  exit 2
}
# set_once NAME VALUE: exports a variable, with the value only if it has none.
set_once() { export "$1=${!1:-$2}"; }

MVAR_CODE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
site=${MVAR_SITE:-$MVAR_HOME/slurm/site.env}
# shellcheck source=slurm/site.env.example
if [ -f "$site" ]; then . "$site"; fi
if [ -z "${MVAR_PYTHON:-}" ]; then
  MVAR_PYTHON=$MVAR_HOME/.venv/bin/python
  [ -x "$MVAR_PYTHON" ] || MVAR_PYTHON=$(command -v python3) || fail "no Python found: set MVAR_PYTHON in site.env."
fi
export MVAR_HOME MVAR_PYTHON PYTHONUNBUFFERED=1 PYTHONPATH=$MVAR_CODE${PYTHONPATH:+:$PYTHONPATH}

# What is compiled at the first use is kept on each node's own disk: a shared one would serve every look of every rank, and
# its locks outlive those who took them. `launch` makes the folder on each node, for this user alone. DeepSpeed's extensions
# are kept there too (mvar.run.compiled_extensions).
set_once MVAR_CACHE "/tmp/mvar-cache-$(id -u)"
set_once TRITON_CACHE_DIR "$MVAR_CACHE/triton"
set_once TORCHINDUCTOR_CACHE_DIR "$MVAR_CACHE/inductor"

# Memory of GPUs in segments that grow, so that scales of many lengths leave no holes. NCCL's flight recorder: the last
# collectives of each rank, written down (train.sbatch says where) when one of them fails or a watchdog finds a rank that
# hangs. Newer versions of torch complain of the older names.
case $("$MVAR_PYTHON" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null) in
  1.* | 2.[0-9] | 2.[0-9].* | 2.10 | 2.10.*)
    set_once PYTORCH_CUDA_ALLOC_CONF expandable_segments:True
    set_once TORCH_NCCL_TRACE_BUFFER_SIZE 2000
    TRACE_FILE=TORCH_NCCL_DEBUG_INFO_TEMP_FILE
    ;;
  *)
    if [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then set_once PYTORCH_ALLOC_CONF expandable_segments:True; fi
    if [ -z "${TORCH_NCCL_TRACE_BUFFER_SIZE:-}" ]; then set_once TORCH_FR_BUFFER_SIZE 2000; fi
    # shellcheck disable=SC2034
    TRACE_FILE=TORCH_FR_DUMP_TEMP_FILE
    ;;
esac
set_once TORCH_NCCL_DUMP_ON_TIMEOUT 1

# Since 22.05, srun does not take over the batch job's --cpus-per-task by itself.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# What each task runs in front of its command. Compiled code that somebody else may have put there is not to be run.
# shellcheck disable=SC2016
TASK='trap "" USR1
(umask 077; mkdir -p "$MVAR_CACHE")
if ! [ -O "$MVAR_CACHE" ]; then
  echo "MVAR_CACHE=$MVAR_CACHE on $(hostname): cannot be made, or is not yours. Set MVAR_CACHE in site.env." >&2
  exit 2
fi
cd "$1" && shift && exec "$@"'

# launch [SRUN OPTIONS] -- COMMAND...: the job's tasks, in the site's container if it has one. If one fails, all end.
# They run in this folder, also where a container begins in another. USR1 is ignored until the command listens for it, so
# that asking a task to stop early does not kill it.
launch() {
  local options=()
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  # shellcheck disable=SC2016,SC2086
  srun --kill-on-bad-exit=1 ${options[@]+"${options[@]}"} ${MVAR_LAUNCH:-} bash -c "$TASK" mvar "$PWD" "$@"
}

# examine ARGUMENTS...: writes what the job's first node has into the log, as `mvar doctor` sees it where the tasks will
# run; once a job, of an array of many alike once. MVAR_DOCTOR=off leaves it out. No job fails by it.
examine() {
  if [ "${MVAR_DOCTOR:-on}" = off ] || [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then return 0; fi
  # shellcheck disable=SC2086
  timeout 120 ${MVAR_LAUNCH:-} "${MVAR_TASK_PYTHON:-$MVAR_PYTHON}" -m mvar.doctor "$@" || say "mvar doctor did not finish"
}

# tasks_of_array ARGUMENTS...: sets `share` to the --task and --tasks of this task of an array. With --tasks N among the
# arguments, that is how many there are: a part of an array that is submitted again keeps its old numbers.
tasks_of_array() {
  local word
  share=(--task "${SLURM_ARRAY_TASK_ID:-0}")
  for word in "$@"; do
    case $word in --tasks | --tasks=*) return ;; esac
  done
  if [ "${SLURM_ARRAY_TASK_MIN:-0}" != 0 ] || [ "${SLURM_ARRAY_TASK_MAX:-0}" != $((${SLURM_ARRAY_TASK_COUNT:-1} - 1)) ]; then
    fail "this array does not begin at 0 or has gaps. Submit --array=0-N, or say how many tasks there are: --tasks N."
  fi
  # shellcheck disable=SC2034
  share+=(--tasks "${SLURM_ARRAY_TASK_COUNT:-1}")
}

# need_finished: ends the job unless the training it comes after (MVAR_RUN, if set) has reached its end.
need_finished() {
  if [ -n "${MVAR_RUN:-}" ] && ! [ -e "$MVAR_RUN/FINISHED" ]; then
    fail "training $MVAR_RUN is not finished (see $MVAR_RUN/logs/train.log). Submit it again, then this job."
  fi
}
