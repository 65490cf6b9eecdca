#!/usr/bin/env bash
# The verdict of `evaluate.py --sanity` on networks whose state is known: results/verdict-NAME.json.
#   results/verdict.sh DATA OUT
# No sign of masked gradients: adversarially trained and undefended ones. Masked: FGSM training,
# and verdict_nets.py.
# See queue.sh for what happens to a run. MORE="--limit 200 --epochs 1" tries the commands out.
set -euo pipefail
data=$(realpath "$1") out=$(realpath -m "$2")
cd "$(dirname "$0")/.."
commit=ed1cb6f
judge=f478dd8
source results/queue.sh

network() {  # NAME FLAGS...: trained with sat_rx.py
  train "verdict-$1" sat_rx.py --precision float32 --val 1000 --seed 0 "${@:2}" ${MORE:-}
}

given() {  # NAME FILE: a network that is there
  if [ ! -e "$out/verdict-$1.done" ]; then
    cp "$2" "$out/verdict-$1.pt"
    touch "$out/verdict-$1.done"
  fi
}

judged() {  # NAME BASELINE FLAGS...
  publish "verdict-$1" "verdict-$1" --sanity --baseline "runs/verdict-$2.pt" --limit 500 \
    --attacks clean,fgsm,pgd-40 "${@:3}"
}

mnist="--dataset mnist --model cnn-small"
cifar="--dataset cifar10 --model cnn-small --normalize none --batch-size 128 --lr 0.05"
ten="--attack-steps 10 --step-size 0.06"
network nt $mnist --method nt --epochs 5
network fgsm-at $mnist --method fgsm-at --epochs 20
network trades $mnist --method trades $ten --epochs 8
# From scratch PGD-AT of cnn-small stays at chance for its first epochs.
network pgd-at $mnist --method pgd-at $ten --epochs 3 --init runs/verdict-trades.pt
network r1-1 $mnist --method r1 --lam 0 --ce-all --attack-steps 10 --epochs 5
network cifar-nt $cifar --method nt --epochs 10
network cifar-fgsm-at $cifar --method fgsm-at --epochs 20
network cifar-pgd-at $cifar --method pgd-at --attack-steps 7 --step-size 2/255 --epochs 8
given sat-r2 results/weights/sat_rx-mnist-r2.pt
given atlas results/weights/atlas-mnist-cnn-small-atlas.pt
for name in nt fgsm-at pgd-at trades r1-1 sat-r2 atlas; do
  judged $name nt
done
for name in cifar-nt cifar-fgsm-at cifar-pgd-at; do
  judged $name cifar-nt
done

# The undefended network of MNIST behind layers that hide its gradient.
if [ ! -e "$out/verdict-bare.pt" ]; then
  python -c "import sys, torch
run = torch.load(sys.argv[1], weights_only=True)
weights = {f'net.{name}': value for name, value in run['best']['state_dict'].items()}
torch.save(weights, sys.argv[2])" "$out/verdict-nt.pt" "$out/verdict-bare.pt"
fi
for name in quantised saturated randomised batch_dependent shattered binarised winners; do
  given $name "$out/verdict-bare.pt"
  judged $name nt --dataset mnist --model results/verdict_nets.py:$name
done
