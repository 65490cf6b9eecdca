"""IAAT: instance-adaptive adversarial training.

Instance adaptive adversarial training: Improved accuracy tradeoffs in neural nets, 2020. One eps for all asks for the
impossible where classes lie close, so every training image has its own: it grows by a little while PGD fails to change
the prediction and shrinks where it does (algorithm 2). Eq. 2, solved as adversarial training is (algorithm 1):
    min over weights of  sum over i of  max over |delta_i| <= eps_i of  CE(f(x_i + delta_i), y_i)

    python iaat.py                                          # the paper's settings: CIFAR-10, ResNet-18, 200 epochs
    python iaat.py --dataset digits                         # bundled real digits: no download, a minute on a CPU
    torchrun --nproc-per-node 8 iaat.py --dataset imagenet --model resnet50 --data-dir /data

Measured (README.md) on 10,000 images of MNIST: clean 98.1 %, PGD-20 87.2 %, against 97.7 and 84.2 of PGD-AT with as
many updates; on CIFAR-10 with 2,000 images alone.
"""

import argparse
import time

import torch

import common

# The paper's settings (tables 10 and 11; eps is eps_w of the warm-up and that of PGD-AT); momentum and normalisation
# are those of the authors' code. MNIST is not in the paper: eps as usual there, gamma in proportion to it, the rest
# ours; `digits` is a smoke test.
CIFAR = dict(model="resnet18", normalize="dataset", epochs=200, batch_size=128, lr=0.1, lr_warmup=0, weight_decay=2e-4,
             momentum=0.9, val=0, eps=8 / 255, gamma=1.9 / 255, beta=0.1, warmup=5, attack_steps=10, select_steps=None,
             step_size=2 / 255, eps_min=0.0, targeted=False)
IMAGENET = dict(CIFAR, model="resnet50", epochs=110, batch_size=None, lr=None, lr_warmup=5, weight_decay=1e-4,
                eps=16 / 255, gamma=4 / 255, warmup=30, attack_steps=30, select_steps=10, step_size=1 / 255,
                eps_min=4 / 255, targeted=True)  # batch_size, lr: `parse`
MNIST = dict(CIFAR, model="lenet+", normalize="none", epochs=30, lr=0.02, eps=0.3, gamma=0.07, attack_steps=20,
             step_size=0.03)
DIGITS = dict(MNIST, epochs=20, batch_size=32, lr=0.05, eps=0.1, gamma=0.024, warmup=3, attack_steps=10, step_size=0.02)
PAPER = {"cifar10": CIFAR, "cifar100": CIFAR, "mnist": MNIST, "digits": DIGITS, "imagenet": IMAGENET}
MODEL = {"wrn-32-10": dict(epochs=110, weight_decay=5e-4, warmup=10)}
DROPS = {"imagenet": (0.1, (35 / 110, 70 / 110, 95 / 110)),  # factor, after which share of the epochs
         "wrn-32-10": (0.2, (70 / 110, 90 / 110, 100 / 110))}
DROPS_ELSE = (0.1, (80 / 200, 140 / 200, 170 / 200))
METHODS = {"iaat": "eps by algorithm 2", "line-search": "the largest eps of a grid that holds (table 7)",
           "pgd-at": "one eps for all", "mixup": "PGD-AT with mixed-up labels (table 8)", "clean": "no adversary"}
OWN, ATTACKED = ("iaat", "line-search"), ("iaat", "line-search", "pgd-at", "mixup")
USES = {"gamma": OWN, "beta": ("iaat",), "warmup": OWN, "eps_min": OWN, "select_steps": OWN, "attack_steps": ATTACKED,
        "step_size": ATTACKED, "targeted": ATTACKED}  # flag -> the methods that read it

# Differences from the paper
# - The memory starts at eps_w and stays so during the warm-up, or without one at 0; in the authors' code it starts at
#   0, and the warm-up writes it: eps_w, or 0 for misclassified images, which later train at their shrunken eps. Ours
#   train on the clean image (algorithm 1, line 11).
# - Whether f(x_i) is right (line 9) and holds (algorithm 2) is asked with BatchNorm in the attack's mode, eval by
#   default; the authors' code attacks in train mode: --attack-mode train.
# - The second candidate is attacked only where the first failed; in train mode everywhere, or BatchNorm would see only
#   the hard images. In eval mode the result is the same.
# - Every PGD with an eps of its own steps by max(step size, eps_i / (0.5 steps)), as in the authors' code.
# - Line search: the grid is gamma, 2 gamma ... 4 eps, its first radius that fails ends it; neither is printed.
# - Mixup: lambda from Beta(1, 1), on the adversarial images alone; not printed.
# - The adversarial and the clean images of line 11 pass the network as one batch, and its BatchNorm with them.
# - bfloat16 where the hardware has it, also for the choice of eps and for validation; the paper trains so on ImageNet
#   alone, and there with FP-16 attacks. evaluate.py is in float32.
# - With --epochs, lr falls after the same shares of the epochs.
# - CIFAR images are padded by reflection, as in the authors' code.
# - ImageNet: the length of lr's warm-up is not printed; 5 epochs, rising step by step from 0.1, as in the recipe it
#   cites; nothing else of that recipe is taken over, nor of the code of Xie et al., whose setting the paper follows,
#   label smoothing and the fifth of the batches whose PGD starts at the clean image. Every attack of an image draws its
#   target anew. BatchNorm's statistics are each process's own, and averaged after the epoch.


def parse(argv=None):
    """The resolved flags; argv as in argparse."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, PAPER)
    flag = parser.add_argument
    flag("--method", choices=list(METHODS), default="iaat",
         help="; ".join(f"{name}: {what}" for name, what in METHODS.items()) + " (%(default)s)")
    flag("--gamma", type=common.unit, help="how far an eps is tried to grow or shrink, in [0, 1] units (the paper's)")
    flag("--beta", type=common.number(0, 1), help="share of the new eps in the memory's average (the paper's)")
    flag("--warmup", type=common.natural, help="epochs with eps for all images; 0: none, and IAAT's eps starts at "
         "0, tables 5 and 6 (the paper's)")
    flag("--eps-min", type=common.number(0, 1), help="lower bound on the eps that is used (the paper's)")
    flag("--attack-steps", type=common.count, help="steps of PGD (the paper's)")
    flag("--select-steps", type=common.count, help="steps of the PGD by which eps is selected (the paper's: 10 on "
         "ImageNet, else --attack-steps)")
    flag("--step-size", type=common.unit, help="smallest step of PGD, in [0, 1] units (the paper's)")
    flag("--targeted", action=argparse.BooleanOptionalAction, help="attack towards a random wrong class (the paper's: "
         "on ImageNet)")
    flag("--lr-warmup", type=common.natural, help="epochs in which lr, where it is above 0.1, rises from there (ours)")
    common.workers_flag(parser)
    args = parser.parse_args(argv)
    common.refuse_unused(args, "method", {name: methods for name, methods in USES.items() if not (
        args.val and methods == ATTACKED)})  # validation attacks every method's network
    model = args.model or PAPER[args.dataset]["model"]
    table_10 = MODEL.get(model, {}) if args.dataset.startswith("cifar") else {}
    common.resolve(args, {**PAPER[args.dataset], **table_10})
    args.batch_size = args.batch_size or 32 * common.ranks()[1]  # table 11: for each GPU; lr in proportion to all
    args.lr = args.lr or 0.1 * args.batch_size / 256
    args.select_steps = args.select_steps or args.attack_steps
    if args.batch_size < common.ranks()[1]:
        raise common.UsageError(f"--batch-size {args.batch_size} is for all {common.ranks()[1]} processes together")
    if args.method in OWN and args.warmup >= args.epochs:
        raise common.UsageError(f"--warmup {args.warmup} leaves none of {args.epochs} epochs for an eps of their own")
    if args.method == "line-search" and args.gamma > 4 * args.eps:
        raise common.UsageError(f"--gamma {args.gamma:g}: the grid ends at 4 eps, {4 * args.eps:g}")
    return args


def aims(y, args):
    """What PGD is given for labels y (N,): y itself, or as many random wrong classes where it is targeted."""
    classes = common.DATASETS[args.dataset]["classes"]
    return (y + torch.randint_like(y, 1, classes)) % classes if args.targeted else y


def fixed_pgd(model, x, y, args, mode):
    """PGD of one eps for all images, from a random start."""
    return common.pgd(model, x, aims(y, args), args.eps, args.step_size, args.attack_steps, targeted=args.targeted,
                      mode=mode)


def adaptive_pgd(model, x, target, eps, noise, steps, args):
    """PGD in balls of radius eps (N,) from x + eps noise; the step reaches any ball's border in half of the steps."""
    step = (eps / (0.5 * steps)).clamp(min=args.step_size)
    return common.pgd(model, x, target, eps, step, steps, start=lambda x, eps: (x + eps * noise).clamp(0, 1),
                      targeted=args.targeted, mode=args.attack_mode)


def predicts(model, x, y, args):
    """Where f(x) is y, bool (N,)."""
    with torch.no_grad(), common.model_mode(model, args.attack_mode):
        return model(x).argmax(1) == y


def holds(model, x, y, eps, asked, args):
    """Where f(PGD(x, y, eps)) still is y, bool (N,); False where not `asked`, which costs nothing in eval mode."""
    noise, target = torch.empty_like(x).uniform_(-1, 1), aims(y, args)  # for all: none depends on who is asked
    rows = asked.nonzero()[:, 0] if args.attack_mode == "eval" else torch.arange(len(x), device=x.device)
    result = torch.zeros_like(asked)
    if len(rows):
        x_adv = adaptive_pgd(model, x[rows], target[rows], eps[rows], noise[rows], args.select_steps, args)
        result[rows] = predicts(model, x_adv, y[rows], args)
    return result & asked


def select_eps(model, x, y, memory, args):
    """Algorithm 2 for a batch: (new eps (N,), how often the batch was attacked). memory: eps^mem[j - 1, i], (N,)."""
    everyone = torch.ones_like(y, dtype=torch.bool)
    eps_1, eps_2, eps_3 = memory + args.gamma, memory, memory - args.gamma  # lines 1 to 3
    first = holds(model, x, y, eps_1, everyone, args)  # line 4
    second = holds(model, x, y, eps_2, ~first, args)  # line 6
    eps = torch.where(first, eps_1, torch.where(second, eps_2, eps_3))  # lines 5 to 10
    eps = ((1 - args.beta) * memory + args.beta * eps).clamp(min=0)  # line 11
    return eps, 1 + ((~first).float().mean() if args.attack_mode == "eval" else 1)


def line_search(model, x, y, args):
    """The largest radius of the grid up to which the prediction remains y (section 5.2): (eps (N,), attacks)."""
    eps, asked, attacks = torch.zeros_like(y, dtype=x.dtype), torch.ones_like(y, dtype=torch.bool), 0
    for i in range(1, int(4 * args.eps / args.gamma + 1e-6) + 1):
        attacks = attacks + (asked.float().mean() if args.attack_mode == "eval" else 1)
        asked = holds(model, x, y, torch.full_like(eps, i * args.gamma), asked, args)
        eps = torch.where(asked, i * args.gamma, eps)
        if not asked.any():
            break
    return eps, attacks


def iaat_loss(model, x, y, memory, warm, args):
    """Algorithm 1, lines 3 to 11, for a batch: (named scalars, the images' eps (N,)); "loss" is the one to minimise.

    memory: (N,), every image's eps of the epoch before. warm: whether the warm-up goes on. "passes": forward-backward
    passes of the batch, the update's included; a forward pass alone is a third.
    """
    eps, attacks, k = memory, 0, args.attack_steps
    if args.method == "iaat" and not warm:  # line 6
        eps, attacks = select_eps(model, x, y, memory, args)
    if args.method == "line-search" and not warm:
        eps, attacks = line_search(model, x, y, args)
    if args.method == "clean":
        return dict(loss=common.cross_entropy(model(x), y).mean(), passes=x.new_tensor(1.0)), eps

    # Line 8:  x_i^adv = PGD(x_i, y_i, eps_i)
    if args.method in OWN:
        used, noise = eps.clamp(min=args.eps_min), torch.empty_like(x).uniform_(-1, 1)
        x_adv = adaptive_pgd(model, x, aims(y, args), used, noise, k, args)
    else:
        x_adv = fixed_pgd(model, x, y, args, args.attack_mode)
    if args.method == "mixup":
        share, other = torch.rand(()).to(x), torch.randperm(len(x)).to(y)
        logits = model(share * x_adv + (1 - share) * x_adv[other])
        ce, ce_other = common.cross_entropy(logits, y).mean(), common.cross_entropy(logits, y[other]).mean()
        return dict(loss=share * ce + (1 - share) * ce_other, passes=x.new_tensor(k + 1.0)), eps
    if args.method == "pgd-at":
        return dict(loss=common.cross_entropy(model(x_adv), y).mean(), passes=x.new_tensor(k + 1.0)), eps

    # Lines 9 to 11:  1/N [ sum over S+ of CE(f(x_i^adv), y_i) + sum over S- of CE(f(x_i), y_i) ]
    right = predicts(model, x, y, args)
    loss = common.cross_entropy(model(torch.where(right[:, None, None, None], x_adv, x)), y).mean()
    passes = torch.as_tensor(attacks * (args.select_steps + 1 / 3) + k + 1 / 3 + 1, device=x.device)
    return dict(loss=loss, right=right.float().mean(), passes=passes), eps


def learning_rate(epoch, args):
    """Step decay: after the paper's shares of the epochs lr falls by its factor (tables 10, 11), where lr is above 0.1
    after rising from there. epoch counts from 0 and may be a fraction."""
    factor, drops = DROPS.get(args.model if args.dataset.startswith("cifar") else args.dataset, DROPS_ELSE)
    lr = args.lr - (max(0, args.lr - 0.1) * (1 - epoch / args.lr_warmup) if epoch < args.lr_warmup else 0)
    return lr * factor ** sum(epoch >= max(1, round(drop * args.epochs)) for drop in drops)


def summed(values):
    """A tensor's sum over the processes of torchrun."""
    if common.ranks()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def average_gradients(model, n):
    """Each parameter's gradient becomes the mean over all processes' images, of which n are this one's."""
    if common.ranks()[1] > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        total = summed(torch.cat([n * grad.flatten() for grad in grads] + [grads[0].new_tensor([n])]))
        for grad, mean in zip(grads, (total[:-1] / total[-1]).split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))


def average_statistics(model):
    """BatchNorm's running statistics become their mean over the processes."""
    for buffer in model.net.buffers():
        if buffer.is_floating_point():
            buffer.copy_(summed(buffer.clone()) / common.ranks()[1])


def merged(memory, seen):
    """The memory with every process's images, of which those of `seen` (N,) are this one's."""
    if common.ranks()[1] > 1:
        fresh = torch.full_like(memory, -1).index_copy_(0, seen, memory[seen])
        torch.distributed.all_reduce(fresh, torch.distributed.ReduceOp.MAX)
        memory = torch.where(fresh < 0, memory, fresh)
    return memory


def eps_row(memory, index):
    """What figs. 7 and 8 show of the training images' eps, on the 0 to 255 scale: mean, quantiles, three images."""
    eps = 255 * memory[index]
    row = {"eps/mean": eps.mean().item()}
    row |= {f"eps/{100 * q:.0f}%": torch.quantile(eps.cpu(), q).item() for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    return row | {f"eps/image_{i}": 255 * memory[i].item() for i in index[common.subset(len(index), 3)].tolist()}


def main():
    args = parse()
    device, precision = common.set_up(args.device, args.precision, parallel=True)
    run = common.Run("iaat", dict(vars(args), precision=precision), device)
    train, val = common.load_train(args.dataset, args.data_dir, args.val, args.limit, device, args.workers)

    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, args.dataset, args.normalize, device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)

    first = run.restore(model, optimizer)
    if summed(torch.tensor([first], device=device)).item() != first * common.ranks()[1]:
        raise common.UsageError(f"--resume: not every process finds {run.resume_path}, put it where all of them do")
    state = run.method_state or dict(
        memory=torch.full((int(train.index.max()) + 1,), args.eps if args.warmup else 0.0), snapshots={})
    memory = state["memory"].to(device)  # eps of every image, by its index in the training set
    for epoch in range(first, args.epochs):
        started, meter, seen = time.perf_counter(), common.Meter(epoch), []
        model.train()
        augment = common.DATASETS[args.dataset]["augment"] and "reflect"
        for x, y, index in common.train_batches(train, args.batch_size, args.seed, epoch, augment):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch + len(seen) * args.batch_size / len(train.labels), args)
            with common.autocast(device, precision):
                terms, memory[index] = iaat_loss(model, x, y, memory[index], epoch < args.warmup, args)
            optimizer.zero_grad()
            terms["loss"].backward()
            average_gradients(model, len(x))
            optimizer.step()
            meter.add(len(x), terms)
            seen.append(index)

        average_statistics(model)
        memory = merged(memory, torch.cat(seen))
        row, means = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}, meter.read()
        *sums, n = summed(meter.n.item() * torch.tensor([*means.values(), 1], device=device)).tolist()
        terms = dict(zip(means, (total / n for total in sums)))
        row |= {"cost/passes": terms.pop("passes"), **{f"train/{name}": value for name, value in terms.items()}}
        row["seconds"] = time.perf_counter() - started
        row["cost/ms_per_batch"] = 1000 * row["seconds"] * args.batch_size / len(train.labels)
        if args.method in OWN:
            row |= eps_row(memory.clamp(min=args.eps_min), train.index)
            if (epoch + 1) % max(1, args.epochs // 8) == 0:  # of fig. 8
                state["snapshots"][epoch + 1] = memory.cpu().clone()
        if args.val:
            def attack(x, y):
                return fixed_pgd(model, x, y, args, "eval")
            common.seed_stream(args.seed, "validation", epoch)
            with common.autocast(device, precision):
                clean, robust = (common.accuracy(model, val, attack=a) for a in (None, attack))
            row |= {"val/clean": clean, "val/robust": robust}
        run.finish_epoch(model, optimizer, row, row.get("val/robust"), dict(state, memory=memory.cpu().clone()))
    run.close()


if __name__ == "__main__":
    common.cli(main)
