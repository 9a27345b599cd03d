#!/bin/bash
# pipeline.sh: submit everything from images to figures, each job after the one it needs, and print the job ids.
#
#   slurm/pipeline.sh --images imagenet --tokenizer vae.pth --config recipes/d16.yaml --out out/d16 [options]
#
#   --out DIR             DIR/codes, DIR/run, DIR/samples, DIR/grid.png, DIR/sheet.png, DIR/figures.json, DIR/logs
#   --codes FILE          configuration of mvar tokenize (default recipes/tokenize.yaml)
#   --nodes N             nodes of the training (1)
#   --gpus N              GPUs of a node, each with one task (8); 0: none
#   --tasks-per-node N    where that is not the number of GPUs
#   --chain N             jobs that the training may take, one after the other (30)
#   --tokenize-tasks N    (8)   --sample-tasks N  (16)
#   --per-class N         samples of each class (50)
#   --features FILE       Inception's file: FID, KID, precision and recall against the store's images (docs/evaluate.md);
#                         without it a classifier of small pictures judges, at --size
#   --size PX             size at which the classifier sees images (64)
#   --sbatch WORD         one more option for every sbatch, such as --sbatch --time=2:00:00
#   --tokenize WORD, --train WORD, --sample WORD, --evaluate WORD     one more argument for that command
#   --dry-run             print what would be submitted
#
# Run it again with the same arguments after a failure: what is complete is verified and kept.
set -euo pipefail
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
wrong() {
  usage >&2
  printf '\npipeline.sh: %s\n' "$*" >&2
  exit 2
}

MVAR_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export MVAR_HOME
site=${MVAR_SITE:-$MVAR_HOME/slurm/site.env}
# shellcheck source=slurm/site.env.example
if [ -f "$site" ]; then . "$site"; fi

# Started inside of a job: what Slurm told that one is not for the new ones.
for name in "${!SLURM_@}"; do
  case $name in SLURM_CONF | SLURM_CLUSTERS | SLURM_JWT | SLURM_TIME_FORMAT) ;; *) unset "$name" ;; esac
done

images='' tokenizer='' config='' out='' per_node='' dry=''
codes=recipes/tokenize.yaml nodes=1 gpus=8 chain=30 tokenize_tasks=8 sample_tasks=16 per_class=50 size=64 features=''
every=() tokenize=() train=() sample=() evaluate=()
while [ $# -gt 0 ]; do
  if [ "$1" = --dry-run ]; then
    dry=yes
    shift
    continue
  fi
  case $1 in -h | --help) usage && exit ;; esac
  [ $# -ge 2 ] || wrong "$1 needs a value."
  case $1 in
    --images) images=$2 ;;
    --tokenizer) tokenizer=$2 ;;
    --config) config=$2 ;;
    --out) out=$2 ;;
    --codes) codes=$2 ;;
    --nodes) nodes=$2 ;;
    --gpus) gpus=$2 ;;
    --tasks-per-node) per_node=$2 ;;
    --chain) chain=$2 ;;
    --tokenize-tasks) tokenize_tasks=$2 ;;
    --sample-tasks) sample_tasks=$2 ;;
    --per-class) per_class=$2 ;;
    --size) size=$2 ;;
    --features) features=$2 ;;
    --sbatch) every+=("$2") ;;
    --tokenize) tokenize+=("$2") ;;
    --train) train+=("$2") ;;
    --sample) sample+=("$2") ;;
    --evaluate) evaluate+=("$2") ;;
    *) wrong "unknown option $1." ;;
  esac
  shift 2
done
if [ -z "$images" ] || [ -z "$tokenizer" ] || [ -z "$config" ] || [ -z "$out" ]; then
  wrong "--images, --tokenizer, --config and --out are required."
fi
[ "$gpus" != 0 ] || [ -n "$per_node" ] || wrong "--gpus 0 needs --tasks-per-node."
one_gpu=$((gpus > 0))
[ -n "$dry" ] || mkdir -p "$out/logs"

# submit NAME DEPENDENCY OPTIONS... -- ARGUMENTS...: sets `id` to the new job's.
submit() {
  local name=$1 after=$2 options=()
  shift 2
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  options+=(${every[@]+"${every[@]}"})
  if [ -n "$after" ]; then options+=("--dependency=$after" --kill-on-invalid-dep=yes); fi
  set -- sbatch --parsable ${options[@]+"${options[@]}"} "$MVAR_HOME/slurm/$name.sbatch" "$@"
  if [ -n "$dry" ]; then
    id="<$name>"
    printf '%q ' "$@" | sed 's/\\\([<>]\)/\1/g; s/ $/\n/'
  else
    id=$("$@")
    id=${id%%;*} # On a federation: id;cluster.
    printf '%-10s %s\n' "$name" "$id"
  fi
}

log=$out/logs/%x
submit tokenize '' --array="0-$((tokenize_tasks - 1))" --gpus-per-node=$one_gpu --output="$log-%A_%a.log" -- \
  --config "$codes" "source=$images" "tokenizer=$tokenizer" "store=$out/codes" ${tokenize[@]+"${tokenize[@]}"}
# After whatever end: it checks everything itself, and names the tasks to run again.
submit finalize "afterany:$id" --output="$log-%j.log" -- "$out/codes" --tokenizer "$tokenizer" --sheet "$out/sheet.png"
submit train "afterok:$id" --array="1-$chain%1" --nodes="$nodes" --gpus-per-node="$gpus" \
  --ntasks-per-node="${per_node:-$gpus}" --output="$log-%A.log" -- \
  --config "$config" "run=$out/run" "data.store=$out/codes" "data.tokenizer=$tokenizer" ${train[@]+"${train[@]}"}
# After whatever end: what is left of a finished chain is cancelled, which Slurm does not call ok. The job looks itself.
export MVAR_RUN=$out/run
submit sample "afterany:$id" --array="0-$((sample_tasks - 1))" --gpus-per-node=$one_gpu --output="$log-%A_%a.log" -- \
  --weights "$out/run" --tokenizer "$tokenizer" --per-class "$per_class" --out "$out/samples" --grid "$out/grid.png" \
  ${sample[@]+"${sample[@]}"}
if [ -n "$features" ]; then
  how=(--features "$features" --store "$out/codes" --reference "$out/reference.npz")
else
  how=(--classifier "$out/classifier.safetensors" --size "$size")
fi
submit evaluate "afterok:$id" --gpus-per-node=$one_gpu --output="$log-%j.log" -- \
  --samples "$out/samples" --images "$images" --json "$out/figures.json" ${how[@]+"${how[@]}"} ${evaluate[@]+"${evaluate[@]}"}
