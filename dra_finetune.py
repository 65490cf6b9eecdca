"""DRA: adversarial fine-tuning with a dynamically regulated adversary.

Hou et al., "Adversarial Fine-tune with Dynamically Regulated Adversary", 2022. As robust as
possible at no loss of clean accuracy (eq. 7): a network that was trained on clean images is
fine-tuned on clean and on adversarial batches in turn. The adversary follows the gradient itself,
not its sign, and changes the most salient values only (algorithm 1).
    min over theta of  E max CE(x + delta, y)   such that   E CE(x; theta) <= E CE(x; theta_std)

    python dra_finetune.py                        # CIFAR-10, ResNet-50: both phases
    python dra_finetune.py --init vanilla.pt      # the second phase, from a --method vanilla
    python dra_finetune.py --dataset digits       # bundled real digits, a minute on a CPU

Measured: results/dra.md.
"""

import argparse
import copy
import math
import time

import torch

import common

# The paper's settings (section V.A). Of the first phase, of learning rates and of validation
# images the paper prints nothing: ours. A dictionary has a value per method.
# eps: of the training adversary, with --adversary pgd eps_if_pgd instead. Of DRA it is the mean
# change per value; of PGD from scratch table I's. Either falls to eps_end_share of itself. The last
# clean_share of the epochs is clean. pgd_ratio: at this multiple of DRA's eps a vanilla network
# keeps the same accuracy under PGD (section V.C); validation uses it. p: the share of values that
# DRA changes. lam: 1/lambda of TRADES, one of tables II and III (table I: 1 and 6; V: not printed);
# MART's lambda is that of its own paper. CIFAR-100 and TinyImageNet are not in the paper: they take
# CIFAR-10's settings.
CIFAR10 = dict(
    model="resnet50", normalize="none", augment="crop-flip", batch_size=128, weight_decay=2e-4,
    momentum=0.9, val=5000, epochs={"finetune": 60, "dual": 60, "else": 100},
    lr={"finetune": 0.01, "dual": 0.01, "else": 0.1}, pretrain_epochs=100, pretrain_lr=0.1,
    has_first_phase={"finetune": True, "dual": True, "else": False},
    adversary={"madry": "pgd", "trades": "pgd", "mart": "pgd", "else": "dra"}, attack_steps=5,
    eps=2 / 255, p=1 / 3, pgd_ratio=2.55,
    eps_if_pgd={"finetune": 2.55 * 2 / 255, "dual": 2.55 * 2 / 255, "else": 8 / 255},
    eps_end_share={"finetune": 1 / 4, "dual": 1 / 4, "else": 1},
    clean_share={"finetune": 1 / 6, "else": 0}, lam={"mart": 5.0, "else": 0.05}, dual_lr=0.1)
MNIST = dict(
    CIFAR10, model="lenet+", augment="crop", epochs={"finetune": 50, "dual": 50, "else": 20},
    lr={"finetune": 0.01, "dual": 0.01, "else": 0.05}, pretrain_epochs=20, pretrain_lr=0.05,
    attack_steps=20, eps=0.1, p=2 / 3, pgd_ratio=3.0,
    eps_if_pgd={"finetune": 3.0 * 0.1, "dual": 3.0 * 0.1, "else": 0.3}, eps_end_share=1,
    clean_share=0, lam={"mart": 5.0, "else": 0.1})
DIGITS = dict(
    MNIST, augment="none", batch_size=32, epochs=8, pretrain_epochs=8, attack_steps=10, eps=0.05,
    pgd_ratio=2.0, eps_if_pgd={"finetune": 2.0 * 0.05, "dual": 2.0 * 0.05, "else": 0.1})
PAPER = {"cifar10": CIFAR10, "mnist": MNIST, "digits": DIGITS}

# Added to the second phase's epochs in the random seeds: it repeats no order or crop of the first.
SECOND_PHASE = 10_000

# Differences from the paper
# - A step is alpha g / mean |g|, not alpha g / sum |g|: divided by the sum, eps 1/255 or 2/255
#   changes nothing. eps is so at most the mean change per value, before the filter and the clip.
# - The last gradient ranks the values, by its magnitude. Printed are the pixel values against a
#   signed threshold, and the algorithm's indices ask for one more gradient. The result is clipped
#   to [0, 1].
# - As printed, nothing bounds the change of a single value. --linf does: ours.
# - The attacked network is the one in training, as figure 2 and table V need it, after the clean
#   update of the same batch. Algorithm 1's input says the clean-data network: --attacked
#   first-phase.
# - MNIST: LeNet+; TRADES's networks have 20-50-500 channels unpadded, or 10-20-50 with dropout.
#   Random crops without flips, which make no sense for digits. --augment none: neither phase
#   crops.
# - Tables V and VI: --eps 1/255, and --adversary pgd --eps 2.55/255 for table V's PGD rows; whether
#   eps fell there is not printed.
# - lr falls as a cosine within each phase. PGD as an adversary steps by 2.5 eps / steps from a
#   random start.
# - --method dual solves eqs. 8 and 9 as printed, by ascent on lambda against the first phase's
#   loss on the training images, augmented as in training and with BatchNorm in its mode; eps
#   falls, and no epoch is clean. The paper's own training replaces them by the alternation.
#   lambda starts at 1 and moves by dual_lr 0.1 a step: ours.
# - The last epoch is kept, not the best on validation: the last epochs repair clean accuracy.
# - Attacks see BatchNorm in eval mode (--attack-mode train: the other). bfloat16 where the hardware
#   has it, also for validation.
# - TRADES and MART start from x plus a Gaussian of deviation 0.001, as their own authors' code
#   does, with DRA as the adversary, too.
# - The methods from scratch keep eps, and train with PGD unless told otherwise, as in tables I to
#   III. That of the TRADES rows of tables II and III is not printed, table I's is ours.


# ---------------------------------------------------------------------------------- the adversary
# x: images (N, C, H, W), y: labels (N,). mode: of BatchNorm and dropout while an attack runs.

def dra_attack(model, x, target, eps, steps, p, linf=None, loss=common.cross_entropy, start=None,
               mode="eval"):
    """The dynamically regulated adversary, algorithm 1. x: in [0, 1], else ValueError.

    eps: at most the mean change per value before the filter, a number or (N,). p: the share of
    values that it may change. linf: at most the change of any value, a number or (N,), in [0, 1]
    units; None: no bound. target: what `loss` compares logits with. start: function (x, eps) ->
    x_0, x itself by default. A gradient of zero moves nothing.
    """
    common.check_images(x)
    x = x.detach()
    x_t = x if start is None else start(x, eps)
    alpha = common.per_image(eps, x) / steps
    with common.model_mode(model, mode):
        for _ in range(steps):
            g, _ = common.input_gradient(model, x_t, target, loss)
            # x_{t+1} = x_t + alpha g / mean|g|
            x_t = x_t + alpha * g / g.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
            if linf is not None:
                radius = common.per_image(linf, x)
                x_t = x_t.clamp(x - radius, x + radius).clamp(0, 1)
    # The filter: all but the share p of values with the largest |g| get back what they were.
    return torch.where(most_salient(g, p), x_t, x).clamp(0, 1)


def most_salient(g, p):
    """Where the share p of an image's values with the largest |g| are, bool, as g (N, C, H, W)."""
    size = g.abs().flatten(1)
    kept = torch.zeros_like(size, dtype=torch.bool)
    kept.scatter_(1, size.topk(round(p * size.shape[1]), dim=1).indices, True)
    return kept.view_as(g)


def attack(model, x, target, eps, adversary, attack_steps, p, linf=None,
           loss=common.cross_entropy, start=None, mode="eval"):
    """The adversarial images of a network: by DRA, or by PGD in the eps-ball. linf: of DRA."""
    if adversary == "dra":
        return dra_attack(model, x, target, eps, attack_steps, p, linf, loss, start, mode)
    step = 2.5 * eps / attack_steps
    return common.pgd(model, x, target, eps, step, attack_steps,
                      start=start or common.uniform_start, loss=loss, mode=mode)


# ------------------------------------------------------------------------------------- the losses
# Each returns named scalars; "loss" is the one to minimise. linf: DRA's bound on the change of any
# value, or None. attacked: the network that the adversary attacks, model itself where it is None.

def clean_loss(model, x, y):
    """CE on clean images.

    The first phase, and the first update of each batch of the second (section IV.A).
    """
    ce = common.cross_entropy(model(x), y).mean()
    return dict(loss=ce, ce_clean=ce)


def adversarial_loss(model, x, y, eps, adversary, attack_steps, p, linf=None, attacked=None,
                     mode="eval"):
    """CE on adversarial images.

    The second update of each batch (section IV.A), and the training of Madry et al. 2018.
    """
    attacked = model if attacked is None else attacked
    x_adv = attack(attacked, x, y, eps, adversary, attack_steps, p, linf, mode=mode)
    ce_adv = common.cross_entropy(model(x_adv), y).mean()
    return dict(loss=ce_adv, ce_adv=ce_adv)


def dual_loss(model, x, y, eps, adversary, attack_steps, p, multiplier, ce_std, dual_lr, linf=None,
              attacked=None, mode="eval"):
    """One update on both, weighted by lambda of eqs. 8 and 9.

    multiplier: lambda, a scalar tensor.
    ce_std: E CE(x; theta_std), the first phase's loss. "next_multiplier" is lambda after eq. 9.
    """
    # Eq. 8:  E CE(x') + lambda E [CE(x; theta) - CE(x; theta_std)]
    attacked = model if attacked is None else attacked
    x_adv = attack(attacked, x, y, eps, adversary, attack_steps, p, linf, mode=mode)
    ce_adv = common.cross_entropy(model(x_adv), y).mean()
    ce_clean = common.cross_entropy(model(x), y).mean()
    excess = ce_clean - ce_std
    # Eq. 9:  lambda <- max(0, lambda + dual_lr * excess)
    joint_excess = common.joint_mean(excess.detach(), x)
    next_multiplier = (multiplier + dual_lr * joint_excess).clamp(min=0)
    return dict(loss=ce_adv + multiplier * excess, ce_clean=ce_clean, ce_adv=ce_adv,
                multiplier=multiplier, next_multiplier=next_multiplier)


def trades_loss(model, x, y, eps, lam, adversary, attack_steps, p, linf=None, mode="eval"):
    """TRADES: CE(x) + 1/lambda KL(p(x) || p(x')).

    x' maximises the KL. lam: 1/lambda.
    """
    logits = model(x)
    with torch.no_grad(), common.model_mode(model, mode):
        reference = model(x)
    x_adv = attack(model, x, reference, eps, adversary, attack_steps, p, linf, common.kl,
                   common.gaussian_start, mode)
    ce_clean = common.cross_entropy(logits, y).mean()
    kl = common.kl(model(x_adv), logits).mean()
    return dict(loss=ce_clean + lam * kl, ce_clean=ce_clean, kl=kl)


def mart_loss(model, x, y, eps, lam, adversary, attack_steps, p, linf=None, mode="eval"):
    """MART (Wang et al. 2020), table I: images that are misclassified count more.

    mean over x of  BCE(p(x'), y) + lam KL(p(x) || p(x')) (1 - p_y(x)), where
    BCE(p, y) = -log p_y - log(1 - max over k != y of p_k)
    """
    x_adv = attack(model, x, y, eps, adversary, attack_steps, p, linf,
                   start=common.gaussian_start, mode=mode)
    logits = model(x)
    logits_adv = model(x_adv).float()
    total = logits_adv.logsumexp(1)
    runner_up = logits_adv.scatter(1, y[:, None], -math.inf).argmax(1, keepdim=True)
    others = logits_adv.scatter(1, runner_up, -math.inf).logsumexp(1)  # all but the runner-up
    bce = (common.cross_entropy(logits_adv, y) + total - others).mean()
    p_true = logits.float().softmax(1).gather(1, y[:, None])[:, 0]
    kl = (common.kl(logits_adv, logits) * (1 - p_true)).mean()
    return dict(loss=bce + lam * kl, bce=bce, weighted_kl=kl)


# -------------------------------------------------------------------------------- flags and loop

def settings(flags, facts):
    """The defaults for the data set, the method, the adversary and the eps of the command line."""
    table = common.table_settings(PAPER, flags, facts)
    ratio = table.pop("pgd_ratio")
    eps_if_pgd = table.pop("eps_if_pgd")
    if (flags.adversary or table["adversary"]) == "pgd":
        table["eps"] = eps_if_pgd
        ratio = 1
    eps = flags.eps or table["eps"]
    table["eps_end"] = table.pop("eps_end_share") * eps
    pgd_eps = flags.linf or ratio * eps
    table["pgd_eps"] = pgd_eps if flags.normalized_eps else min(1.0, pgd_eps)
    epochs = flags.epochs or table["epochs"]
    table["clean_epochs"] = round(table.pop("clean_share") * epochs)
    return table


def parse(losses, argv=None):
    """(flags, facts, defaults): see common.parse_flags. losses: the dictionary of main."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, dataset="cifar10", notes=dict(
        schedule="paper: falls as a cosine, in each phase",
        eps="of DRA the mean change per value"))
    group = parser.add_argument_group("method", common.method_lines(losses))
    method_flags(group.add_argument, losses)
    args, facts, defaults, given = common.parse_flags(parser, argv, settings, losses,
                                                      always=("eps", "epochs"))
    check_flags(args, given)
    return args, facts, defaults


def method_flags(flag, losses):
    """The script's own flags. flag: the add_argument of a group. losses: the dictionary of main."""
    flag("--method", "--strategy", metavar="NAME", choices=losses, default="finetune", help="one "
         "of the above; finetune makes two updates per batch; it and dual train vanilla first, or "
         "start with --init (%(default)s)")
    flag("--adversary", choices=["dra", "pgd"], help="of training; pgd: projected gradient descent "
         "(%(default)s)")
    flag("--attacked", choices=["present", "first-phase"], default="present", help="the network "
         "that the adversary attacks: the one in training, or the one that the first phase left, "
         "which stays as it is (%(default)s)")
    flag("--p", type=common.number(0, 1), help="share of the values that DRA changes (%(default)s)")
    flag("--linf", type=common.number(0, 1), default=0.0, help="the most by which DRA changes any "
         "value, in [0, 1] units; 0: no bound (%(default)s)")
    flag("--eps-end", type=common.number(0, 1), help="where eps has fallen to after the last "
         "adversarial epoch, in [0, 1] units (%(default)s)")
    flag("--pgd-eps", type=common.unit, help="radius of validation's PGD, in [0, 1] units. It "
         "follows --eps: with DRA it is the multiple of eps at which a vanilla network keeps as "
         "much accuracy, with PGD eps itself. With --linf it is that bound (%(default)s)")
    flag("--normalized-eps", action="store_true", help="eps, eps-end, linf and pgd-eps are in "
         "units of images divided by the data set's deviation")
    flag("--attack-steps", type=common.count, help="steps of the adversary (%(default)s)")
    flag("--clean-epochs", type=common.natural, help="last epochs, on clean images only "
         "(%(default)s)")
    flag("--pretrain-epochs", type=common.count, help="epochs of the first phase (%(default)s)")
    flag("--pretrain-lr", type=common.number(0, above=True), help="learning rate of the first "
         "phase, its highest (%(default)s)")
    flag("--lam", type=common.number(0), help="weight of TRADES's KL, 1/lambda; MART's lambda "
         "(%(default)s)")
    flag("--dual-lr", type=common.number(0), help="dual: step of the ascent on lambda "
         "(%(default)s)")


def check_flags(args, given):
    """UsageError where flags do not fit together. given: names of those on the command line."""
    if given & {"pretrain_epochs", "pretrain_lr"} and (args.init or not args.has_first_phase):
        raise common.UsageError("--pretrain-epochs and --pretrain-lr are for a first phase: not "
                                f"for --init, nor for --method {args.method}")
    of_dra = sorted(given & {"p", "linf"})
    if of_dra and args.adversary == "pgd":
        raise common.UsageError(f"--adversary pgd has no use for --{of_dra[0]}: that is for dra")
    if args.attacked == "first-phase" and args.attack_mode == "train":
        raise common.UsageError("--attacked first-phase: that network stays as it is, which "
                                "--attack-mode train would change")
    if args.eps_end > args.eps:
        raise common.UsageError(f"--eps-end {common.shown(args.eps_end)}: eps falls to it from "
                                f"{common.shown(args.eps)}")
    if args.clean_epochs >= args.epochs:
        raise common.UsageError(f"--clean-epochs {args.clean_epochs} leaves none of {args.epochs} "
                                "epochs")


def eps_at(epoch, epochs, eps, eps_end):
    """The adversary's eps in an epoch, from 0: linear from eps to eps_end (section V.A)."""
    return eps - (eps - eps_end) * epoch / max(1, epochs - 1)


def learning_rate(args, epoch, step_share):
    """The rate at an epoch, from 0, of whose steps the share `step_share` is done."""
    if args.schedule == "onecycle":  # one cycle per phase
        return args.lr * common.one_cycle((epoch + step_share) / args.epochs)
    return args.lr * 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))


def mean_clean_loss(model, batches):
    """Mean cross-entropy of an epoch's batches, BatchNorm as in training: E CE(x; theta_std)."""
    model = copy.deepcopy(model).train()  # a copy: its running statistics move
    total = 0.0
    images = 0
    with torch.no_grad():
        for x, y, _ in batches:
            total += common.cross_entropy(model(x), y).sum().item()
            images += len(y)
    sums = torch.tensor([total, images], dtype=torch.float64, device=y.device)
    total, images = common.summed(sums).tolist()
    return total / images


def state_at_start(args, model, train, val, second):
    """What the phase goes by: lambda's first value and, in the second one, what it starts from.

    std: E CE(x; theta_std) of eq. 7, where it is needed. before: accuracy on validation images.
    first_phase: the weights that the first phase left, with --attacked first-phase alone.
    """
    state = dict(multiplier=torch.tensor(1.0), std=0.0, before=0.0)
    if args.method == "dual":
        batches = common.train_batches(train, args.batch_size, args.seed, 0, args.augment)
        state["std"] = mean_clean_loss(model, batches)
    if second and args.val:
        state["before"] = common.accuracy(model, val)
    if second and args.attacked == "first-phase":
        state["first_phase"] = common.copy_of_weights(model.net)
    return state


def frozen_copy(model, weights):
    """The network that has these weights of model's backbone; it stays as it is, in eval mode."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    frozen.net.load_state_dict(weights)
    return frozen


def train_epoch(run, args, updates, model, optimizer, train, epoch, offset, state):
    """One epoch, counted from 0; returns its row of the log. eps is in the unit of its flag.

    updates: see `train_phase`. offset: added to the epoch in the seeds. state: its lambda moves.
    """
    started = time.perf_counter()
    meter = common.Meter(epoch)
    model.train()
    steps = common.steps_per_epoch(len(train.labels), args.batch_size)
    adversarial_epochs = args.epochs - args.clean_epochs
    clean = epoch >= adversarial_epochs
    updates_now = updates[:1] if clean else updates
    batches = common.train_batches(train, args.batch_size, args.seed, epoch, args.augment, offset)
    for step, (x, y, _) in enumerate(batches):
        lr = learning_rate(args, epoch, (step + 0.5) / steps)
        common.set_lr(optimizer, lr)
        terms = {}
        for loss in updates_now:
            with common.autocast(x.device, run.precision):  # anew: it keeps copies of weights
                terms |= loss(x, y, epoch, state)
            common.update(optimizer, terms["loss"], len(x))
        state["multiplier"] = terms.pop("next_multiplier", state["multiplier"])
        meter.add(len(x), terms)

    common.average_buffers(model.net)
    row = {"epoch": epoch + 1, "lr": lr}
    if "eps" in common.flags_read(updates):
        row["eps"] = 0.0 if clean else eps_at(epoch, adversarial_epochs, args.eps, args.eps_end)
    row |= {f"train/{name}": value for name, value in meter.read().items()}
    row["seconds"] = time.perf_counter() - started
    return row


def train_phase(run, args, updates, model, train, val, radius, second):
    """One phase, from the present weights, or those of --init or of an interrupted run.

    updates: the losses of each batch's updates, in order: functions of (x, y, epoch, state) ->
    terms. radius: of validation's PGD, in [0, 1] units. second: whether a phase went before.
    """
    device = train.labels.device
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay, fused=True)
    first = run.start(model, optimizer)
    tell(run, common.flags_read(updates), args, train, val, second)
    with common.autocast(device, run.precision):
        kept = run.method_state or state_at_start(args, model, train, val, second)
    state = dict(kept, multiplier=kept["multiplier"].to(device), networks={"present": model})
    if "first_phase" in kept:
        state["networks"]["first-phase"] = frozen_copy(model, kept["first_phase"])
    offset = SECOND_PHASE if second else 0
    for epoch in range(first, args.epochs):
        row = train_epoch(run, args, updates, model, optimizer, train, epoch, offset, state)
        if args.val:
            common.seed_stream(args.seed, "validation", offset + epoch)
            with common.autocast(device, run.precision):
                row |= validate(model, val, radius)
        if args.val and second:
            row["val/lost"] = state["before"] - row["val/clean"]
        kept = dict(kept, multiplier=state["multiplier"].cpu())
        run.finish_epoch(model, optimizer, row, method_state=kept)
    run.close()


def tell(run, reads, args, train, val, second):
    """Print what runs and what the columns are. second: whether a phase went before."""
    attacks = (f"pgd-10 (step {common.shown(args.pgd_eps / 4)}): under attack at eps "
               f"{common.shown(args.pgd_eps)}")
    if second:
        attacks += "; lost: points of clean accuracy below the start of this phase"
    run.tell(reads, train, val, attacks, renamed={"val/robust": "pgd-10"})


def validate(model, val, radius):
    """Accuracy on clean images and under PGD-10 with steps of a quarter of the radius."""
    def attack(x, y):
        return common.pgd(model, x, y, radius, radius / 4, 10)
    return {"val/clean": common.accuracy(model, val),
            "val/robust": common.accuracy(model, val, attack=attack)}


def main():
    # One line per method. A flag that only other methods' lines read is refused. The lines run
    # later: args, model and the like are set below. state: of `train_phase`.
    # Each has the losses of its updates of a batch, in order; clean epochs make the first alone.
    losses = {
        "finetune": [
            lambda x, y, epoch, state: clean_loss(model, x, y),
            lambda x, y, epoch, state: adversarial_loss(
                model, x, y,
                scale * eps_at(epoch, args.epochs - args.clean_epochs, args.eps, args.eps_end),
                args.adversary, args.attack_steps, args.p, scale * args.linf or None,
                state["networks"][args.attacked], args.attack_mode)],
        "dual": [lambda x, y, epoch, state: dual_loss(
            model, x, y, scale * eps_at(epoch, args.epochs, args.eps, args.eps_end),
            args.adversary, args.attack_steps, args.p, state["multiplier"], state["std"],
            args.dual_lr, scale * args.linf or None, state["networks"][args.attacked],
            args.attack_mode)],
        "madry": [lambda x, y, epoch, state: adversarial_loss(
            model, x, y, scale * eps_at(epoch, args.epochs, args.eps, args.eps_end),
            args.adversary, args.attack_steps, args.p, scale * args.linf or None,
            mode=args.attack_mode)],
        "trades": [lambda x, y, epoch, state: trades_loss(
            model, x, y, scale * eps_at(epoch, args.epochs, args.eps, args.eps_end), args.lam,
            args.adversary, args.attack_steps, args.p, scale * args.linf or None,
            args.attack_mode)],
        "mart": [lambda x, y, epoch, state: mart_loss(
            model, x, y, scale * eps_at(epoch, args.epochs, args.eps, args.eps_end), args.lam,
            args.adversary, args.attack_steps, args.p, scale * args.linf or None,
            args.attack_mode)],
        "vanilla": [lambda x, y, epoch, state: clean_loss(model, x, y)],
    }
    args, facts, defaults = parse(losses)
    device, precision = common.set_up(args.device, args.precision, tf32=args.tf32)
    scale = common.pixel_scale(facts) if args.normalized_eps else 1.0
    train, val = common.load_train(facts, args.data_dir, args.val, args.limit, device, args.workers)

    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, facts, args.normalize, device)
    radius = scale * args.pgd_eps
    run = common.Run(__file__, args, defaults, facts, precision, earlier_suffixes=[".vanilla.pt"])
    begun = common.going_on(args.ckpt, args.resume)
    if args.has_first_phase and not args.init and not begun:
        first_args = argparse.Namespace(**vars(args))
        first_args.method = "vanilla"
        first_args.epochs = args.pretrain_epochs
        first_args.lr = args.pretrain_lr
        first_args.clean_epochs = 0
        first_args.keep_epochs = None
        first_args.ckpt = str(run.path.with_suffix(".vanilla.pt"))
        first_run = common.Run(__file__, first_args, defaults, facts, precision)
        train_phase(first_run, first_args, losses["vanilla"], model, train, val, radius,
                    second=False)
    train_phase(run, args, losses[args.method], model, train, val, radius,
                second=args.has_first_phase)
    if args.val and args.has_first_phase:
        row = run.history[-1]
        before = row["val/lost"] + row["val/clean"]
        print(f"clean accuracy on validation images: {100 * before:.2f} % before, "
              f"{100 * row['val/clean']:.2f} % after")


if __name__ == "__main__":
    common.cli(main)
