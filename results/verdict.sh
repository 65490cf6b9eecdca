#!/usr/bin/env bash
# The verdict of `evaluate.py --sanity` on networks whose state is known: results/verdict-NAME.json.
#   results/verdict.sh DATA OUT
# Sound: adversarially trained and undefended ones. Masked: FGSM training, and verdict_nets.py.
# MORE="--limit 200 --epochs 1" tries the commands out.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2")
cd "$(dirname "$0")/.."
commit=$(git rev-parse --short HEAD)
source results/queue.sh
sat() {  # NAME FLAGS...: trained with sat_rx.py
  train "verdict-$1" sat_rx.py --precision float32 --val 1000 --seed 0 "${@:2}" ${MORE:-}
}
judge() {  # NAME CKPT BASELINE FLAGS...
  [ -e "results/verdict-$1.json" ] || nice python evaluate.py --ckpt "$2" --baseline "$3" \
    --data-dir "$data" --attacks clean,fgsm,pgd-40 --limit 500 --record "$out/verdict-$1.eval" \
    --results "results/verdict-$1.json" "${@:4}" > "$out/verdict-$1.log" 2>&1 ||
    echo "  failed: $(tail -n 1 "$out/verdict-$1.log")"
}
mnist="--dataset mnist --model cnn-small"
cifar="--dataset cifar10 --model cnn-small --normalize none --batch-size 128 --lr 0.05"
steps="--attack-steps 7 --step-size 2/255"
sat nt $mnist --method nt --epochs 5
sat fgsm-at $mnist --method fgsm-at --epochs 20
sat pgd-at $mnist --method pgd-at --attack-steps 10 --step-size 0.06 --epochs 5
sat trades $mnist --method trades --attack-steps 10 --step-size 0.06 --epochs 8
sat r1-1 $mnist --method r1 --lam 0 --ce-all --attack-steps 10 --epochs 5
sat cifar-nt $cifar --method nt --epochs 10
sat cifar-fgsm-at $cifar --method fgsm-at --epochs 20
sat cifar-pgd-at $cifar --method pgd-at $steps --epochs 8

nt=$out/verdict-nt.pt
for name in nt fgsm-at pgd-at trades r1-1; do
  judge $name "$out/verdict-$name.pt" "$nt"
done
for name in cifar-nt cifar-fgsm-at cifar-pgd-at; do
  judge $name "$out/verdict-$name.pt" "$out/verdict-cifar-nt.pt"
done
judge sat-r2 results/weights/sat_rx-mnist-r2.pt "$nt"
judge atlas results/weights/atlas-mnist-cnn-small-atlas.pt "$nt"
python -c "import sys, torch
run = torch.load(sys.argv[1], weights_only=True)
weights = {f'net.{name}': value for name, value in run['best']['state_dict'].items()}
torch.save(weights, sys.argv[2])" "$nt" "$out/verdict-bare.pt"
for name in quantised saturated randomised batch_dependent shattered binarised winners; do
  judge "$name" "$out/verdict-bare.pt" "$nt" --dataset mnist \
    --model "results/verdict_nets.py:$name"
done
