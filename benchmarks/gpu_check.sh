#!/usr/bin/env bash
# What only a machine with a GPU can show, in at most 20 minutes: benchmarks/gpu_check.sh OUT
#
# The folder OUT gets, as they come: a log of each step, figures as JSON, and results.md, whose tables can go into
# docs/results.md. A step that fails or runs out of time does not stop the others; the exit status is 1 then. Steps may
# be run a few at a time into one OUT, with KEEP=1; one that is run again replaces what it left.
#
# Needs Python with torch, transformers, lightning, torchmetrics, peft, accelerate, pyarrow, psutil and pytest. From the
# environment:
#   PYTHON   python3
#   WHEELS   a folder of wheels that are not installed (bitsandbytes, jsonargparse, datasets, and what they need);
#            they are unpacked into OUT/site
#   MODEL    .cache/smollm2-135m-instruct: the model of the quick start and of the small benchmarks
#   SCRATCH  OUT/scratch: gets 16 GB of random weights, removed at the end unless KEEP=1
#   STEPS    all: those of "tests quickstart weights qlora estimate rollout continuous score train_step" to run
#   MINUTES  20: for everything, a whole number
#   DEVICE   cuda; DEVICE=cpu SIZE=tiny rehearses every step where there is no GPU
#   SIZE     full, or tiny
set -u -o pipefail
if [ $# -ne 1 ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
mkdir -p "$1" && OUT=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
MODEL=${MODEL:-.cache/smollm2-135m-instruct}
SCRATCH=${SCRATCH:-$OUT/scratch}
STEPS=${STEPS:-all}
DEVICE=${DEVICE:-cuda}
SIZE=${SIZE:-full}
DEADLINE=$((SECONDS + 60 * ${MINUTES:-20}))
QLORA=$SCRATCH/qlora-$SIZE
export HF_HUB_OFFLINE=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

case $DEVICE in cuda) accelerator=gpu ;; cpu) accelerator=cpu ;; *) echo "DEVICE=$DEVICE: cuda or cpu" >&2; exit 2 ;; esac
case $SIZE in full | tiny) ;; *) echo "SIZE=$SIZE: full or tiny" >&2; exit 2 ;; esac
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --upgrade --target "$OUT/site" \
    "$WHEELS"/*.whl || exit 2
  export PYTHONPATH=$OUT/site:$PYTHONPATH
fi
if [ "$DEVICE" = cuda ] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no GPU here: DEVICE=cpu SIZE=tiny rehearses the steps without one" >&2
  exit 2
fi

KNOWN=" tests quickstart weights qlora estimate rollout continuous score train_step "
for name in $STEPS; do
  case "$KNOWN all " in *" $name "*) ;; *) echo "STEPS: no step is named $name, but:$KNOWN" >&2; exit 2 ;; esac
done

running=
watcher=
finish() {
  # timeout hands the signal on to all that the step has started
  [ -n "$running" ] && kill "$running" 2>/dev/null && wait "$running"
  [ -n "$watcher" ] && kill "$watcher" 2>/dev/null
  [ "${KEEP:-0}" = 1 ] || rm -f "$QLORA"/*/*.safetensors
}
trap finish EXIT
trap 'exit 130' INT TERM

failed=0
touch "$OUT/steps.tsv"

wanted() { case " $STEPS " in *" all "* | *" $1 "*) ;; *) return 1 ;; esac; }

# step NAME SECONDS COMMAND...: run it, keep its output and its exit status
step() {
  local name=$1 limit=$2 begun=$SECONDS status=0 shown
  shift 2
  wanted "$name" || return
  rm -f "$OUT/$name.json"
  : >"$OUT/$name.log"
  [ "$DEVICE" = cpu ] && limit=$((3 * limit)) # the limits are a GPU's
  [ $((DEADLINE - SECONDS)) -lt "$limit" ] && limit=$((DEADLINE - SECONDS))
  printf '\n=== %s, at most %d s ===\n' "$name" "$limit"
  if [ "$limit" -le 0 ]; then
    status=124
    echo "no time is left" | tee "$OUT/$name.log"
  else
    timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1 &
    running=$!
    tail -n +1 -s 0.2 -f --pid="$running" "$OUT/$name.log" &
    shown=$!
    wait "$running" || status=$?
    running=
    wait "$shown"
  fi
  [ "$status" -ne 0 ] && failed=1
  grep -v "^$name"$'\t' "$OUT/steps.tsv" >"$OUT/steps.new"
  printf '%s\t%d\t%d\t%d\n' "$name" "$status" $((SECONDS - begun)) "$limit" >>"$OUT/steps.new"
  mv "$OUT/steps.new" "$OUT/steps.tsv"
  printf '=== %s: exit status %d after %d s ===\n' "$name" "$status" $((SECONDS - begun))
  "$PYTHON" benchmarks/gpu_report.py "$OUT" >/dev/null
}

# one number for each size: pick FULL TINY
pick() { if [ "$SIZE" = full ]; then echo "$1"; else echo "$2"; fi; }

step tests 180 "$PYTHON" -m pytest -p no:cacheprovider -rs -m gpu

if wanted quickstart; then
  rm -rf "$OUT/prompts" "$OUT/quickstart"
  mkdir "$OUT/prompts"
  for name in train eval; do
    head -n "$(pick 100000 12)" "configs/quickstart/$name.jsonl" >"$OUT/prompts/$name.jsonl"
  done
fi
step quickstart 240 "$PYTHON" -m sppo_lightning fit --config configs/quickstart.yaml \
  --trainer.accelerator "$accelerator" --trainer.devices 1 --trainer.logger false \
  --trainer.default_root_dir "$OUT/quickstart" --model.policy.pretrained "$MODEL" \
  --data.prompts "$OUT/prompts/train.jsonl" --data.eval_prompts "$OUT/prompts/eval.jsonl" \
  --data.iterations "$(pick 3 1)"

step weights 180 "$PYTHON" benchmarks/qlora_8b.py "$QLORA" --shape "$(pick 8b tiny)" --device "$DEVICE"

if wanted qlora; then
  rm -rf "$QLORA/run" "$OUT/qlora.yaml" "$OUT/qlora.csv" "$OUT/device.csv"
  if [ "$DEVICE" = cuda ] && command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=timestamp,memory.used --format=csv,noheader,nounits -l 1 >"$OUT/device.csv" &
    watcher=$!
  fi
fi
step qlora 420 "$PYTHON" -m sppo_lightning fit --config "$QLORA/config.yaml"
if [ -n "$watcher" ]; then
  kill "$watcher"
  watcher=
fi
if wanted qlora; then
  cp "$QLORA/config.yaml" "$OUT/qlora.yaml" 2>/dev/null
  cp "$QLORA/run/metrics.csv" "$OUT/qlora.csv" 2>/dev/null
fi

tolerance=
[ "$DEVICE" = cuda ] && tolerance=--tolerance=0.15
step estimate 90 "$PYTHON" benchmarks/memory_check.py --config "$QLORA/config.yaml" \
  --metrics "$OUT/qlora.csv" --json "$OUT/estimate.json" $tolerance

rollout=(benchmarks/rollout.py --model "$MODEL" --device "$DEVICE"
  --prompts "$(pick 32 2)" --new-tokens "$(pick 128 4)" --prompt-tokens "$(pick 256 16)" --responses "$(pick 8 2)")
step rollout 180 "$PYTHON" "${rollout[@]}" --unrecorded --rounds "$(pick 2 1)" --json "$OUT/rollout.json"
step continuous 180 "$PYTHON" "${rollout[@]}" --rounds 1 --continuous --json "$OUT/continuous.json"

step score 90 "$PYTHON" benchmarks/score.py --model "$MODEL" --device "$DEVICE" \
  --prompts "$(pick 32 2)" --prompt-tokens "$(pick 256 16)" --response-tokens "$(pick 256 16)" \
  --responses "$(pick 8 2)" --rounds "$(pick 2 1)" --json "$OUT/score.json"

arms=ours,plain
"$PYTHON" -c 'import trl' 2>/dev/null && arms=ours,trl-best
step train_step 240 "$PYTHON" benchmarks/train_step.py --shape "$(pick 8b tiny)" --device "$DEVICE" --arms "$arms" \
  --lora-rank 16 --checkpointing --prompt-tokens "$(pick 512 32)" --response-tokens "$(pick 512 16)" \
  --pairs "$(pick 4 2)" --steps "$(pick 8 2)" --warm-up 2 --json "$OUT/train_step.json"

echo
"$PYTHON" benchmarks/gpu_report.py "$OUT" || failed=1
exit "$failed"
