"""ATLAS: adversarial training via local stability.

Adversarial Training via LocAl Stability, 2021. A weak adversary x' is worth more when the network is made stable around
it: a small Jacobian there (local), and a prediction that agrees with the one at the clean image (global). Eq. 12:
    mean over x of  CE(x') + alpha * ||J(x')||_F^2 + beta * KL(p(x') || p(x)),     x' in the eps-ball around x

    python atlas.py --steps 1 --alpha 2e-4 --beta 5         # the paper's one-step ATLAS on CIFAR-10, WRN-28-8
    python atlas.py --dataset digits                        # bundled real digits: no download, a minute on a CPU

Measured on MNIST alone (README.md): of cnn-small's accuracy on 500 images PGD-1000 leaves 80.2 % with one-step ATLAS
and 72.0 with one-step ADV if the seed is 0, but 40.4 and 75.0 if it is 1.
"""

import argparse
import functools
import time

import torch

import common

# The paper's settings (appendix B). MNIST's "4-layer CNN" of two convolutional and two fully connected layers is not
# printed: LeNet+ is one. Momentum on MNIST is ours. `digits` is a smoke test, its settings are ours.
CIFAR = dict(model="wrn-28-8", normalize="none", epochs=100, batch_size=64, lr=0.1, weight_decay=2e-4, momentum=0.9,
             val=5000, eps=8 / 255, fgsm_step=1.25, step_size=0.007, val_steps=10, ramp=15, clip_start=True)
MNIST = dict(CIFAR, model="lenet+", batch_size=128, lr=0.01, weight_decay=0.0, eps=0.3, step_size=0.01, val_steps=20,
             clip_start=False)
DIGITS = dict(MNIST, epochs=30, batch_size=32, lr=0.02, val=237, eps=0.1, step_size=0.02, val_steps=10, ramp=4)
PAPER = {"cifar10": CIFAR, "cifar100": CIFAR, "mnist": MNIST, "digits": DIGITS}
WEIGHTS = {  # (alpha, beta) for one step and for several; zero-step JAC has no adversary
    "cifar10": {"atlas": [(2e-4, 5.0), (1e-4, 5.0)], "trades": [(0.0, 2.0), (0.0, 4.0)], "jac": [(0.5, 0.0)] * 2,
                "tradesjac": [(2e-4, 0.5)] * 2, "adv": [(0.0, 0.0)] * 2},
    "cifar100": {"atlas": [(2e-4, 5.0), (1e-4, 10.0)], "trades": [(0.0, 2.0), (0.0, 4.0)], "jac": [(0.5, 0.0)] * 2,
                 "tradesjac": [(2e-4, 0.5)] * 2, "adv": [(0.0, 0.0)] * 2},
    "mnist": {"atlas": [(1e-5, 0.3), (5e-6, 0.2)], "trades": [(0.0, 1.0)] * 2, "jac": [(0.5, 0.0)] * 2,
              "tradesjac": [(1e-5, 0.3)] * 2, "adv": [(0.0, 0.0)] * 2},
}  # not printed: tradesjac for several steps, and on MNIST, where it has one-step ATLAS's; what ATLAS-l and -g had
WEIGHTS["digits"] = WEIGHTS["mnist"]
LOCAL, ATTACKED = ("atlas", "jac", "tradesjac"), ("atlas", "adv", "trades", "tradesjac")
USES = {"alpha": LOCAL, "projections": LOCAL, "beta": ("atlas", "trades", "tradesjac"), "steps": ATTACKED,
        "ramp": ATTACKED, "clip_start": ATTACKED, "fgsm_step": ATTACKED}  # flag -> the losses that read it

# Differences from the paper
# - ||J||_F^2 is C ||v^T d logits / dx'||^2 with v uniform on the unit sphere, squared as the text has it; eqs. 2, 6 and
#   12 print no square. The public package that the paper cites has a factor of 1/2: an alpha of its authors may mean
#   half of ours.
# - One step: on CIFAR the random start is clipped to [0, 1] before its gradient is taken, on MNIST it is not, as in the
#   code of Wong et al., whose advice the paper follows. Clipped, a black pixel ends at 0 or eps and nowhere between.
# - Attacks see BatchNorm in eval mode (--attack-mode train: the other, as in the one-step ADV that the paper follows).
# - PGD's step never exceeds the eps of the moment while eps grows.
# - eps grows from step to step. alpha and beta of every loss, not of ATLAS alone, grow with it; JAC, which has no eps,
#   starts with its alpha.
# - The count of epochs without a gain starts when eps has reached its value, or the first cut could come before; the
#   best so far counts from the first epoch. Training ends after 100 epochs at the latest.
# - TRADES and TradesJac with several steps start from x plus a Gaussian of deviation 0.001, as TRADES's authors do.
# - CIFAR images are cropped and flipped; MNIST has no weight decay: the paper says nothing of either.
# - With BatchNorm in training mode the estimate of ||J||_F^2 counts the influence of other images of the batch, too.
# - bfloat16 where the hardware has it, also for the validation attack that guides training; evaluate.py is in float32.


def parse(argv=None):
    """The resolved flags; argv as in argparse."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, PAPER)
    flag = parser.add_argument
    flag("--loss", choices=["atlas", "adv", "trades", "jac", "tradesjac"], default="atlas", help="ATLAS (with --beta 0 "
         "ATLAS-l, with --alpha 0 ATLAS-g), ADV, TRADES, zero-step JAC or TradesJac (%(default)s)")
    flag("--steps", type=common.count, help="steps of the training attack; 1: FGSM from a random start, more: PGD (1)")
    flag("--fgsm-step", type=common.number(0, above=True), help="length of one step in units of eps (the paper's 1.25; "
         "fig. 4: 1.5, 1.8)")
    flag("--clip-start", action=argparse.BooleanOptionalAction, help="clip one step's random start to [0, 1] before "
         "its gradient is taken (Wong et al.'s: on CIFAR, not on MNIST)")
    flag("--step-size", type=common.unit, help="PGD's step, of several steps and of validation, in [0, 1] units (the "
         "paper's)")
    flag("--alpha", type=common.number(0), help="weight of the Jacobian term (the paper's for --loss and --steps)")
    flag("--beta", type=common.number(0), help="weight of the KL term (the paper's for --loss and --steps)")
    flag("--projections", type=common.count, help="random projections of the Jacobian (1)")
    flag("--ramp", type=common.natural, help="epochs over which eps grows from 0 (the paper's)")
    flag("--plateau", type=common.count, default=2, help="epochs without a gain that divide lr by 5 (%(default)s)")
    flag("--patience", type=common.count, default=10, help="epochs without a gain that end training (%(default)s)")
    flag("--val-steps", type=common.count, help="steps of the validation PGD, of --step-size (the paper's)")
    args = parser.parse_args(argv)
    if args.val == 0:
        raise common.UsageError("--val 0: validation guides the learning rate and ends training, it cannot be empty")
    common.refuse_unused(args, "loss", USES)
    args.steps = args.steps or 1
    if args.steps > 1 and (args.clip_start, args.fgsm_step) != (None, None):
        raise common.UsageError("--clip-start and --fgsm-step are for one step")
    alpha, beta = WEIGHTS[args.dataset][args.loss][args.steps > 1]
    ramp = 0 if args.loss == "jac" else PAPER[args.dataset]["ramp"]
    return common.resolve(args, dict(PAPER[args.dataset], ramp=ramp, alpha=alpha, beta=beta, projections=1))


def jacobian_norm(logits, x, projections=1, differentiable=True):
    """Unbiased estimate of ||d logits / dx||_F^2 per sample, (N,), differentiable in the weights (appendix A.1).

    logits: (N, C), computed from x, (N, ...), which requires a gradient. C ||v^T d logits / dx||^2, v uniform on the
    unit sphere of R^C for each sample, averaged over the projections.
    """
    total = 0
    for _ in range(projections):
        v = torch.nn.functional.normalize(torch.randn_like(logits), dim=1)
        projected, = torch.autograd.grad((v * logits).sum(), x, create_graph=differentiable, retain_graph=True)
        total = total + projected.flatten(1).square().sum(1)
    return logits.shape[1] * total / projections


def adversary(model, x, y, eps, args, mode=None):
    """x' in the eps-ball: x for JAC; else one FGSM step (of 1.25 eps), or PGD, from a random start (appendix B). mode:
    of BatchNorm, --attack-mode by default."""
    if args.loss == "jac" or eps == 0:
        return x
    target, loss, mode = y, common.cross_entropy, mode or args.attack_mode
    start = functools.partial(common.uniform_start, clip=args.clip_start or args.steps > 1)
    if args.loss in ("trades", "tradesjac"):
        with common.model_mode(model, mode):  # not under no_grad: autocast would keep such weights
            target, loss = model(x).detach(), common.kl
        start = common.gaussian_start if args.steps > 1 else start
    step = args.fgsm_step * eps if args.steps == 1 else min(args.step_size, eps)
    return common.pgd(model, x, target, eps, step, args.steps, start, loss=loss, mode=mode)


def atlas_loss(model, x, y, growth, args):
    """The training loss on x (N, C, H, W), y (N,), as named scalars; "loss" is the one to minimise.

    growth: eps_t / eps in [0, 1], which scales eps, alpha and beta (appendix A.3). A term of weight 0 is not computed.
    """
    alpha, beta = growth * args.alpha, growth * args.beta
    x_adv = adversary(model, x, y, growth * args.eps, args)

    # Eq. 12:  CE(x') + alpha ||J(x')||^2 + beta KL(p(x') || p(x))
    # TRADES, JAC, TradesJac (appendix D.1):  CE(x) + alpha ||J(x)||^2 + beta KL(p(x) || p(x'))
    center, other = (x_adv, x) if args.loss in ("atlas", "adv") else (x, x_adv)
    center = center.requires_grad_(True) if args.alpha else center
    logits = model(center)
    terms = dict(ce=common.cross_entropy(logits, y).mean())
    loss = terms["ce"]
    if args.alpha:
        terms["jacobian"] = jacobian_norm(logits, center, args.projections).mean()
        loss = loss + alpha * terms["jacobian"]
    if args.beta:
        terms["kl"] = common.kl(model(other), reference=logits).mean()
        loss = loss + beta * terms["kl"]
    return dict(loss=loss, **terms)


def passes(args):
    """Forward-backward passes of a batch per step; a forward pass alone, TRADES's of the target, is a third; the
    Jacobian's backward and its differentiation are one each."""
    attack = 0 if args.loss == "jac" else args.steps + (args.loss in ("trades", "tradesjac")) / 3
    return attack + 1 + 2 * args.projections * bool(args.alpha) + bool(args.beta)


def guide(history, lr, ramp, plateau, patience):
    """(learning rate of the next epoch, whether training ends), a pure function of the epochs so far (appendix B).

    Every `plateau` epochs in a row without a gain in validation robust accuracy divide lr by 5; `patience` end the run.
    """
    best, waited, since = -1.0, 0, 0
    for row in history:
        gain = row["val/robust"] > best
        best = max(best, row["val/robust"])
        waited, since = (0, 0) if gain or row["epoch"] <= ramp else (waited + 1, since + 1)
        if since == plateau:
            lr, since = lr / 5, 0
    return lr, waited >= patience


def validate(model, val, args, device, precision):
    """Accuracy on clean images, under PGD and under the attack of training, both at the full eps, and the Jacobian's
    estimate at the latter's images (fig. 11)."""
    def attack(x, y):
        return common.pgd(model, x, y, args.eps, args.step_size, args.val_steps)
    weak, norms = [], []
    with common.autocast(device, precision), common.model_mode(model, "eval"):
        clean, robust = (common.accuracy(model, val, attack=a) for a in (None, attack))
        for x, y, _ in common.eval_batches(val, 100):
            x_adv = adversary(model, x, y, args.eps, args, mode="eval").requires_grad_(True)
            logits = model(x_adv)
            weak.append(logits.argmax(1) == y)
            norms.append(jacobian_norm(logits, x_adv, differentiable=False))
    return {"val/clean": clean, "val/robust": robust, "val/weak": torch.cat(weak).float().mean().item(),
            "val/jacobian_adv": torch.cat(norms).mean().item()}


def overfits(history):
    """Catastrophic overfitting (appendix E), by a rule of ours: since the best epoch robust accuracy has fallen by 10
    points, and the Jacobian's estimate at the adversary has doubled. That epoch's row, or None."""
    best, now = max(history, key=lambda row: row["val/robust"]), history[-1]
    fallen = now["val/robust"] < best["val/robust"] - 0.1
    return best if fallen and now["val/jacobian_adv"] > 2 * best["val/jacobian_adv"] else None


def announce_overfitting(history):
    """Say so where an epoch overfits and the one before did not."""
    best = overfits(history)
    if best and not overfits(history[:-1]):
        robust, jacobian = ([row[name] for row in (best, history[-1])] for name in ("val/robust", "val/jacobian_adv"))
        print("catastrophic overfitting: robust accuracy has fallen from {:.3f} to {:.3f}, ||J(x')||^2 risen from "
              "{:.3g} to {:.3g}".format(*robust, *jacobian), flush=True)


def main():
    args = parse()
    device, precision = common.set_up(args.device, args.precision)
    run = common.Run("atlas", dict(vars(args), precision=precision), device)
    train, val = common.load_train(args.dataset, args.data_dir, args.val, args.limit, device)

    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, args.dataset, args.normalize, device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)

    batches = -(-len(train.labels) // args.batch_size)
    for epoch in range(run.restore(model, optimizer), args.epochs):
        lr, finished = guide(run.history, args.lr, args.ramp, args.plateau, args.patience)
        if finished:
            print(f"no gain for {args.patience} epochs: training ends")
            break
        started, meter = time.perf_counter(), common.Meter(epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        augment = common.DATASETS[args.dataset]["augment"]
        for step, (x, y, _) in enumerate(common.train_batches(train, args.batch_size, args.seed, epoch, augment)):
            growth = min(1.0, (epoch * batches + step) / (args.ramp * batches)) if args.ramp else 1.0
            with common.autocast(device, precision):
                terms = atlas_loss(model, x, y, growth, args)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            meter.add(len(x), terms)

        row = {"epoch": epoch + 1, "lr": lr, "eps": growth * args.eps}
        row |= {f"train/{name}": value for name, value in meter.read().items()}
        row["seconds"] = time.perf_counter() - started
        row |= {"cost/ms_per_batch": 1000 * row["seconds"] / batches, "cost/passes": passes(args)}
        common.seed_stream(args.seed, "validation", epoch)
        row |= validate(model, val, args, device, precision)
        run.finish_epoch(model, optimizer, row, metric=row["val/robust"])
        announce_overfitting(run.history)
    run.close()


if __name__ == "__main__":
    common.cli(main)
