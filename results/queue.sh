# What the lists of runs share (cifar10.sh, claims.sh, verdict.sh); they source it. They set
#   data, out: absolute folders, of the data sets and of the runs
#   commit: whose code trains; judge: whose code evaluates.
# A run keeps the commit that it began with, goes on where it was killed, and is trained once. What
# is in results/ is not done again. Nothing runs beside the tests or a timing. Start the lists from
# the project's folder.
export WANDB_MODE=${WANDB_MODE:-disabled}
mkdir -p "$out"
trap 'kill -CONT $job 2> /dev/null; kill $job 2> /dev/null' EXIT
job=

train() {  # NAME SCRIPT FLAGS...: OUT/NAME.pt, its log beside it
  local name=$1 script=$2
  shift 2
  if [ -e "results/weights/$name.pt" ] && [ ! -e "$out/$name.pt" ]; then
    cp "results/weights/$name.pt" "$out/$name.pt"  # other runs begin with it
  fi
  if [ -e "$out/$name.done" ] || [ -e "results/$name.json" ]; then return; fi
  [ -e "$out/$name.commit" ] || echo "$commit" > "$out/$name.commit"
  echo "$(date +%T) $name"
  if in_clone "$(cat "$out/$name.commit")" "$name" \
    "$script" --ckpt "runs/$name.pt" --resume "$@"; then touch "$out/$name.done"; fi
}

evaluate() {  # RESULT NAME FLAGS...: adds to what is on record of OUT/NAME.pt
  local result=$1 name=$2
  shift 2
  if [ -e "results/$result.json" ] || [ ! -e "$out/$name.done" ]; then return; fi
  echo "$(date +%T) $result: evaluation"
  in_clone "$judge" "$result.eval" evaluate.py --ckpt "runs/$name.pt" "$@" || true
}

publish() {  # RESULT NAME FLAGS...: the last evaluation for results/RESULT.json, then that file
  rm -f "$out/$1.json"
  evaluate "$@" --results "runs/$1.json"
  if [ -e "$out/$1.json" ]; then cp "$out/$1.json" "results/$1.json"; fi
}

keep() {  # NAME FLAGS...: its last weights in float16 in results/weights/, judged as they are
  local name=$1
  shift
  if [ ! -e "$out/$name.done" ] || [ -n "${MORE:-}" ]; then return; fi
  if [ ! -e "$out/$name.half.done" ] && in_clone "$judge" "$name.eval" evaluate.py \
    --ckpt "runs/$name.pt" --weights last --export "runs/$name.half.pt" --overwrite; then
    touch "$out/$name.half.done"
  fi
  publish "$name" "$name.half" "$@"
  if [ -e "results/$name.json" ]; then cp "$out/$name.half.pt" "results/weights/$name.pt"; fi
}

in_clone() {  # COMMIT NAME COMMAND...: by python, in the code of a commit; its log is NAME.log
  local name=$2 state=CONT code
  code=$(clone "$1")
  shift 2
  (cd "$code" && exec nice -n 19 python "$@") >> "$out/$name.log" 2>&1 &
  job=$!
  while kill -0 $job 2> /dev/null; do
    if pgrep -f '\.ci/run|tests/benchmark\.py' > /dev/null; then state=STOP; else state=CONT; fi
    kill -$state $job 2> /dev/null || true
    sleep 2
  done
  if wait $job; then return 0; fi
  echo "  failed: $(tail -n 1 "$out/$name.log")"
  return 1
}

clone() {  # COMMIT: the folder of its code, in which data/ and runs/ are ours
  local code=$out/code-$1 part=$out/code-$1.$$
  if [ ! -d "$code" ]; then
    git clone --quiet . "$part"
    git -C "$part" checkout --quiet "$1"
    ln -s "$data" "$part/data"
    ln -s "$out" "$part/runs"
    mv -T "$part" "$code" 2> /dev/null || rm -rf "$part"  # another list was faster
  fi
  echo "$code"
}
