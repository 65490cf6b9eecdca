# What the lists of runs share (cifar10.sh, claims.sh); they source it. They set
#   data, out: absolute folders, of the data sets and of the runs; commit: whose code trains.
# A run keeps the commit that it began with, goes on where it was killed, and is trained once. It
# stands still while the tests or a timing run. Run from the project's folder.
export WANDB_MODE=${WANDB_MODE:-disabled}
mkdir -p "$out"
trap 'kill -CONT $job 2> /dev/null; kill $job 2> /dev/null' EXIT
job=

train() {  # NAME SCRIPT FLAGS...: OUT/NAME.pt, its log beside it
  local name=$1 script=$2 code state=CONT
  shift 2
  if [ -e "$out/$name.done" ] || [ -e "results/$name.json" ]; then return; fi
  [ -e "$out/$name.commit" ] || echo "$commit" > "$out/$name.commit"
  code=$(clone "$(cat "$out/$name.commit")")
  echo "$(date +%T) $name"
  (cd "$code" && exec nice python "$script" --ckpt "runs/$name.pt" --resume "$@") \
    >> "$out/$name.log" 2>&1 &
  job=$!
  while kill -0 $job 2> /dev/null; do
    if pgrep -f '\.ci/run|tests/benchmark\.py' > /dev/null; then state=STOP; else state=CONT; fi
    kill -$state $job 2> /dev/null
    sleep 2
  done
  if wait $job; then touch "$out/$name.done"; else echo "  failed: $(tail -n 1 "$out/$name.log")"; fi
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
