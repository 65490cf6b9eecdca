"""SAT-Rx: single-step adversarial training with three regularisers against gradient masking.

Vivek and Babu, "Regularizers for Single-step Adversarial Training", 2020. On samples of FGSM (fast
gradient sign method, one step) alone a network learns to mask its gradient. Each regulariser
penalises a symptom of that. R2 and R3 need no iterative attack. R1 makes one, IFGSM (FGSM in
several steps), on k images of a batch. R-FGSM is FGSM after a random step. g: the logits.
    R1, R2:  CE(x_fgsm) + lambda * mean ||g(x_fgsm) - g(x')||^2     x': by IFGSM (R1), R-FGSM (R2)
    R3:      loss_high + lambda * max(0, loss_low - tau * loss_high)     CE on FGSM at eps, eps_low

    python sat_rx.py --method r2 --dataset digits             # real digits, a minute on a CPU
    python sat_rx.py --method r2 --dataset mnist              # the paper's settings, eps 0.3
    python sat_rx.py --method r1 --dataset mnist --epochs 5 --schedule-epochs 20 --ckpt r1.pt
    python sat_rx.py --method r3 --dataset mnist --epochs 15 --schedule-start 5 --init r1.pt

The last two are SAT-R1 + SAT-R3 of table 9, two parts of one schedule. Measured: results/sat_rx.md.
"""

import math
import time

import torch

import common

# The paper's settings (section 5, table 8). lr, batch size, weight decay, momentum, validation
# size (at most a tenth of the images is taken), eps_low and rfgsm_alpha of R1 to R3 are those of
# the authors' code: the text leaves them out. The baselines take them, too. PGD's step is that of
# the paper's evaluation. A dictionary has a value per method. `digits` is a smoke test, its
# settings are ours. CIFAR-100 and TinyImageNet are not in the paper: they take CIFAR-10's settings.
# ImageNet-100: the network, epochs, eps, lambda, k, tau and attack_steps are printed. lr, batch
# size, weight decay, momentum, val, eps_low and rfgsm_alpha are guesses: CIFAR-10's.
CIFAR10 = dict(
    model="wrn-28-10", normalize="none", augment="crop-flip", epochs=100, batch_size=64, lr=0.1,
    weight_decay=5e-4, momentum=0.9, val=10_000, eps=8 / 255, eps_low=2 / 255,
    rfgsm_alpha=2 / 255, attack_steps=7, step_size=2 / 255, k=1, tau=0.6,
    lam={"r1": 0.2, "r2": 25.0, "r3": 1.0, "trades": 6.0})
MNIST = dict(
    CIFAR10, model="lenet+", augment="none", epochs=20, batch_size=32,
    lr={"r3": 0.05, "else": 0.01}, eps=0.3, eps_low=0.1, rfgsm_alpha=0.01, attack_steps=40,
    step_size=0.01, tau=0.4, lam={"r1": 0.2, "r2": 5.0, "r3": 1.0, "trades": 6.0})
DIGITS = dict(MNIST, epochs=12, lr=0.02, eps=0.1, eps_low=0.03, attack_steps=10, step_size=0.02)
IMAGENET100 = dict(CIFAR10, model="resnet18", augment="none",
                   lam={"r1": 0.05, "r2": 3.0, "r3": 1.0, "trades": 6.0})
PAPER = {"cifar10": CIFAR10, "mnist": MNIST, "digits": DIGITS, "imagenet100": IMAGENET100}

# Differences from the paper
# - Attacks see BatchNorm in eval mode, as in the authors' code. In train mode: --attack-mode train.
# - R1 trains on one forward pass of m + k images, R2 and R3 on one of 2m, as in the authors' code.
# - R-FGSM is eqs. 2 and 3 as printed. R2 of the authors' code steps by eps, not by eps - alpha,
#   and so leaves the ball.
# - R3 starts from the clean image. The authors' code starts after R-FGSM's random step, which
#   leaves the ball by alpha: --r3-noise does so too.
# - R1's IFGSM takes the 40 (MNIST) and 7 (CIFAR-10) steps of table 8. The authors' code takes 10
#   and 3: --attack-steps.
# - lr is divided by 5 after 1/4, 1/2 and 3/4 of the epochs; in the authors' code one epoch later.
# - Table 9 trains with one method after another, and prints no schedule. Here both are parts of one
#   of 20 epochs: its lr falls after 5 and 15, where the method changes. Each part has the lr of its
#   method. SGD's momentum starts at 0 in each part.
# - FGSM-AT and EAT train on one forward pass of clean and FGSM images, TRADES on one of each.
# - FGSM-AT's samples are all at eps. In Kurakin et al. 2017, which the paper cites for FGSM-AT, the
#   eps of each image is random. The paper says neither: --fgsm-eps random.
# - EAT replaces half of the batch, as FGSM-AT does. One network makes these samples: a source or
#   the model itself, drawn per batch.
# - The best epoch has the highest accuracy under IFGSM-3 on held-out images, as in the authors'
#   code. Normal training withstands no IFGSM: its best epoch has the highest clean accuracy.
# - At most a tenth of the training images is held out, as in every script here; the authors' code
#   holds out 10,000: --val 10000.
# - PGD-AT and the PGD on held-out images start in the eps-ball; eq. 6 starts in a ball of one step
#   size.
# - The signals of figs. 1, 2 and 6 are taken once per epoch, on 500 held-out images, 50 of
#   ImageNet's.
# - WRN is the standard one. The authors' has its stride in the second convolution, biases,
#   Xavier's initialisation, shortcuts from before the activation and a last BatchNorm of momentum
#   0.9.
# - ImageNet's images have 224 pixels and are cut by RandomResizedCrop; the paper says random crop,
#   and prints neither the size nor which 100 classes.
# - bfloat16 where the hardware has it, also for the attacks that choose the best epoch.
# - TRADES: 1/lambda = 6 (--lam) and a Gaussian start of deviation 0.001, its own authors' values;
#   the paper has none.


# ---------------------------------------------------------------------- the losses of the paper
# x: images (m, C, H, W), y: labels (m,). Each returns named scalars, the same names at every step;
# "loss" is the one to minimise. mode: of BatchNorm and dropout while an attack runs. ce_all: the
# ablations of section 5.3, with cross-entropy on the regulariser's samples, too.

def r1_loss(model, x, y, eps, lam, attack_steps, k=1, ce_all=False, mode="eval"):
    """SAT-R1, eq. 14: FGSM samples, their logits kept near those of IFGSM samples.

    The pairs are of the last k images.
    """
    # 1/m sum J(f(x_fgsm), y) + lambda 1/k sum ||g(x_fgsm) - g(x_ifgsm)||^2
    m = common.joint_size(x)  # m and k count the images of all processes
    k = min(k, m)
    first = common.rows_below(m - k)  # of this process's pairs
    x_fgsm = common.fgsm(model, x, y, eps, mode=mode)
    x_ifgsm = common.ifgsm(model, x[first:], y[first:], eps, attack_steps, mode=mode)
    g_fgsm, g_ifgsm = model(torch.cat([x_fgsm, x_ifgsm])).tensor_split([len(x)])
    reg = common.joint_sum((g_fgsm[first:] - g_ifgsm).square().sum(1), x) / k
    ce = common.cross_entropy(g_fgsm, y)
    if ce_all:
        ce = torch.cat([ce, common.cross_entropy(g_ifgsm, y[first:])])
        ce = common.joint_sum(ce, x) / (m + k)
    else:
        ce = ce.mean()
    return dict(loss=ce + lam * reg, ce=ce, reg=reg)


def r2_loss(model, x, y, eps, lam, rfgsm_alpha, ce_all=False, mode="eval"):
    """SAT-R2, eq. 15: FGSM samples, their logits kept near those of R-FGSM samples."""
    # 1/m sum J(f(x_fgsm), y) + lambda 1/m sum ||g(x_fgsm) - g(x_rfgsm)||^2
    x_fgsm = common.fgsm(model, x, y, eps, mode=mode)
    x_rfgsm = common.rfgsm(model, x, y, eps, rfgsm_alpha, mode=mode)
    logits = model(torch.cat([x_fgsm, x_rfgsm]))
    g_fgsm, g_rfgsm = logits.split(len(x))
    reg = (g_fgsm - g_rfgsm).square().sum(1).mean()
    if ce_all:
        ce = common.cross_entropy(logits, torch.cat([y, y])).mean()
    else:
        ce = common.cross_entropy(g_fgsm, y).mean()
    return dict(loss=ce + lam * reg, ce=ce, reg=reg)


def r3_loss(model, x, y, eps, lam, eps_low, tau, rfgsm_alpha=0.0, ce_all=False, mode="eval"):
    """SAT-R3, eq. 16: FGSM samples at two radii; the loss must grow with the radius.

    Both radii use one gradient.
    rfgsm_alpha: size of the random step before the gradient, as in the authors' code; 0: none.
    """
    # loss_high + lambda max(0, loss_low - tau loss_high)
    if rfgsm_alpha:
        x = (x + rfgsm_alpha * common.normal_like(x).sign()).clamp(0, 1)
    with common.model_mode(model, mode):
        grad, _ = common.input_gradient(model, x, y)
    x_high = (x + eps * grad.sign()).clamp(0, 1)
    x_low = (x + eps_low * grad.sign()).clamp(0, 1)
    logits = model(torch.cat([x_high, x_low]))
    g_high, g_low = logits.split(len(x))
    loss_high = common.cross_entropy(g_high, y).mean()
    loss_low = common.cross_entropy(g_low, y).mean()
    excess = loss_low - tau * loss_high
    exceeds = common.joint_mean(excess.detach(), x) > 0  # on the images of all processes
    reg = torch.where(exceeds, excess, 0 * excess)
    terms = dict(loss=loss_high + lam * reg, loss_high=loss_high, loss_low=loss_low, reg=reg)
    if ce_all:
        ce = common.cross_entropy(logits, torch.cat([y, y])).mean()
        terms = dict(terms, loss=ce + lam * reg, ce=ce)
    return terms


# --------------------------------------------------------------- the baselines of section 3.2

def nt_loss(model, x, y):
    """Normal training, on clean images."""
    return dict(loss=common.cross_entropy(model(x), y).mean())


def draw_eps(x, eps):
    """A random eps per image, (m,): |N(0, eps/2)|, given that it is at most eps.

    After Kurakin et al. 2017, "Adversarial Machine Learning at Scale".
    """
    # P(|N(0, eps/2)| <= z) = erf(z / (sqrt(2) eps/2)): a uniform share of erf(sqrt(2)), inverted
    share = common.drawn_like(x[:, 0, 0, 0], lambda values: values.uniform_())
    z = math.sqrt(2) * eps / 2 * torch.erfinv(share * math.erf(math.sqrt(2)))
    return z.clamp(max=eps)


def fgsm_at_loss(model, x, y, eps, random_eps=False, mode="eval"):
    """FGSM-AT: half of the batch is replaced by FGSM samples.

    random_eps: whether each sample has an eps of its own, of which `eps` is the largest.
    """
    half = common.rows_below(common.joint_size(x) // 2)
    if random_eps:
        eps = draw_eps(x, eps)[:half]
    x_fgsm = common.fgsm(model, x[:half], y[:half], eps, mode=mode)
    return dict(loss=common.cross_entropy(model(torch.cat([x_fgsm, x[half:]])), y).mean())


def eat_loss(model, sources, x, y, eps, mode="eval"):
    """EAT: ensemble adversarial training, FGSM-AT with samples of --source networks too.

    Which network makes the samples is drawn per batch.
    """
    half = common.rows_below(common.joint_size(x) // 2)
    drawn = torch.randint(1 + len(sources), ()).item()
    if drawn == 0:
        x_fgsm = common.fgsm(model, x[:half], y[:half], eps, mode=mode)
    else:  # sources stay in eval mode
        x_fgsm = common.fgsm(sources[drawn - 1], x[:half], y[:half], eps)
    return dict(loss=common.cross_entropy(model(torch.cat([x_fgsm, x[half:]])), y).mean())


def rfgsm_at_loss(model, x, y, eps, rfgsm_alpha, mode="eval"):
    """R-FGSM samples alone: ablation R2-2."""
    x_rfgsm = common.rfgsm(model, x, y, eps, rfgsm_alpha, mode=mode)
    return dict(loss=common.cross_entropy(model(x_rfgsm), y).mean())


def pgd_at_loss(model, x, y, eps, step_size, attack_steps, mode="eval"):
    """PGD-AT: samples of projected gradient descent (Madry et al. 2018)."""
    x_pgd = common.pgd(model, x, y, eps, step_size, attack_steps, mode=mode)
    return dict(loss=common.cross_entropy(model(x_pgd), y).mean())


def trades_loss(model, x, y, eps, lam, step_size, attack_steps, mode="eval"):
    """TRADES: CE(x) + 1/lambda KL(p(x) || p(x')).

    x' maximises the KL. lam: 1/lambda.
    """
    logits = model(x)
    with torch.no_grad(), common.model_mode(model, mode):
        reference = model(x)
    x_adv = common.pgd(model, x, reference, eps, step_size, attack_steps,
                       start=common.gaussian_start, loss=common.kl, mode=mode)
    ce = common.cross_entropy(logits, y).mean()
    kl = common.kl(model(x_adv), logits).mean()
    return dict(loss=ce + lam * kl, ce=ce, kl=kl)


# ---------------------------------------------------------------------------------------- the cost

def step_cost(method, m, attack_steps, k=1):
    """What a step on m images takes in forward-backward passes of m images: name -> number.

    cost/attack: those that make the adversarial samples; table 8 prints them for one sample (FBP).
    cost/passes: all, the update's included; a forward pass alone is a third, as in TRADES's
    attack. EAT's may be of a source. Nothing is known of a method that is not here.
    """
    replaced = m // 2 / m  # half of the batch
    pairs = min(k, m) / m
    attack_and_training = {
        "nt": (0, 1), "fgsm-at": (replaced, 1), "rfgsm-at": (1, 1), "eat": (replaced, 1),
        "pgd-at": (attack_steps, 1), "trades": (attack_steps, 2 + 1 / 3),
        "r1": (1 + pairs * attack_steps, 1 + pairs), "r2": (2, 2), "r3": (1, 2)}
    if method not in attack_and_training:
        return {}
    attack, training = attack_and_training[method]
    return {"cost/attack": attack, "cost/passes": attack + training}


# ---------------------------------------------------------------------- what watches for masking

def masking_signals(model, x, y, eps, rfgsm_alpha, step_size, steps):
    """What figs. 1, 2 and 6 watch, on held-out images: name -> mean.

    Distances between the logits of FGSM samples and those of IFGSM and R-FGSM samples, the loss on
    PGD minus that on FGSM samples, and the accuracies under FGSM and PGD.
    """
    with common.model_mode(model, "eval"):
        x_fgsm = common.fgsm(model, x, y, eps)
        x_ifgsm = common.ifgsm(model, x, y, eps, steps)
        x_rfgsm = common.rfgsm(model, x, y, eps, rfgsm_alpha)
        x_pgd = common.pgd(model, x, y, eps, step_size, steps)
        with torch.no_grad():
            fgsm, ifgsm, rfgsm, pgd = [model(z) for z in (x_fgsm, x_ifgsm, x_rfgsm, x_pgd)]
    gap = common.cross_entropy(pgd, y) - common.cross_entropy(fgsm, y)
    signals = {"val/fgsm": (fgsm.argmax(1) == y).float(),
               "val/pgd": (pgd.argmax(1) == y).float(),
               "masking/l2_ifgsm": (fgsm - ifgsm).norm(dim=1),
               "masking/l2_rfgsm": (fgsm - rfgsm).norm(dim=1),
               "masking/loss_gap": gap}
    return {name: values.mean().item() for name, values in signals.items()}


def announce_masking(history):
    """Say so when FGSM no longer finds what PGD finds, 20 points apart, and when it does again."""
    masked = [row["val/fgsm"] - row["val/pgd"] > 0.2 for row in history]
    before = len(masked) > 1 and masked[-2]
    if masked[-1] != before:
        what = "sets in" if masked[-1] else "is over"
        row = history[-1]
        print(f"gradient masking {what}: {100 * row['val/fgsm']:.0f} % of validation images "
              f"survive FGSM, {100 * row['val/pgd']:.0f} % PGD", flush=True)


# ------------------------------------------------------------------------------- flags and loop

def settings(flags, facts):
    """The defaults for the data set, the method and eps of the command line."""
    table = common.table_settings(PAPER, flags, facts,
                                  with_eps=("eps_low", "rfgsm_alpha", "step_size"))
    epochs = flags.epochs or table["epochs"]
    table["schedule_epochs"] = flags.schedule_start + epochs
    return table


def parse(losses, argv=None):
    """(flags, facts, defaults): see common.parse_flags. losses: the dictionary of main."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, dataset="cifar10", notes=dict(
        schedule="paper: divided by 5 after 1/4, 1/2 and 3/4 of the epochs"))
    group = parser.add_argument_group("method", common.method_lines(losses))
    method_flags(group.add_argument, losses)
    schedule_flags(parser.add_argument_group("part of a longer schedule").add_argument)
    args, facts, defaults, given = common.parse_flags(parser, argv, settings, losses)
    refuse_contradictions(args, given)
    return args, facts, defaults


def method_flags(flag, methods):
    """The flags of the methods. flag: the add_argument of a group."""
    flag("--method", metavar="NAME", choices=methods, default="r2", help="one of the above "
         "(%(default)s)")
    flag("--lam", type=common.number(0), help="lambda, the regulariser's weight; TRADES: the "
         "weight of its KL, 1/lambda (%(default)s)")
    flag("--tau", type=common.number(0, 1), help="R3: the loss at --eps-low is penalised where it "
         "exceeds tau times the loss at --eps (%(default)s)")
    flag("--k", type=common.count, help="R1: pairs of FGSM and IFGSM samples of a batch "
         "(%(default)s)")
    flag("--attack-steps", metavar="N", type=common.count, help="steps of R1's IFGSM, of PGD-AT "
         "and of TRADES (%(default)s)")
    flag("--step-size", type=common.unit, help="step of PGD-AT's and TRADES's PGD, in [0, 1] units "
         "(%(default)s)")
    flag("--rfgsm-alpha", type=common.unit, help="R-FGSM's first, random step, in [0, 1] units "
         "(%(default)s)")
    flag("--eps-low", type=common.unit, help="R3: the smaller radius, in [0, 1] units "
         "(%(default)s)")
    flag("--r3-noise", action="store_true", help="R3: FGSM starts after a random step of "
         "--rfgsm-alpha, as in the authors' code")
    flag("--ce-all", action="store_true", help="R1 to R3: cross-entropy on the regulariser's "
         "samples too. For the ablations: with --lam 0 it is R1-1, R2-1 or R3-2. R1-3 also has a "
         "--k of 40 %% of --batch-size. R3-1 is --method r3 --lam 0 without this flag")
    flag("--fgsm-eps", choices=["fixed", "random"], default="fixed", help="FGSM-AT: all samples at "
         "--eps, or each image at an eps of its own, |N(0, eps/2)| up to --eps (%(default)s)")
    flag("--source", metavar="CKPT", action="append", default=[], help="EAT: a network that also "
         "makes FGSM samples; may be repeated")


def schedule_flags(flag):
    """The flags for a part of a longer schedule. flag: the add_argument of a group."""
    flag("--schedule-epochs", metavar="N", type=common.count, help="epochs of the whole schedule; "
         "by default it ends with this run (%(default)s)")
    flag("--schedule-start", metavar="N", type=common.natural, default=0, help="how many epochs of "
         "the schedule the network of --init was trained for (%(default)s)")


def refuse_contradictions(args, given):
    """UsageError where flags contradict each other. given: the names that the command line has."""
    if args.method == "r3" and "rfgsm_alpha" in given and not args.r3_noise:
        raise common.UsageError("--method r3 reads --rfgsm-alpha with --r3-noise alone")
    if args.method == "eat" and not args.source:
        raise common.UsageError("--method eat needs --source CKPT, once or more")
    if args.source and args.method != "eat":
        raise common.UsageError(f"--method {args.method} has no use for --source: that is for eat")
    if args.rfgsm_alpha >= args.eps:
        raise common.UsageError(f"--rfgsm-alpha ({common.shown(args.rfgsm_alpha)}) must be below "
                                f"--eps ({common.shown(args.eps)})")
    if args.eps_low >= args.eps:
        raise common.UsageError(f"--eps-low ({common.shown(args.eps_low)}) must be below --eps "
                                f"({common.shown(args.eps)})")
    if args.schedule_start and not args.init:
        raise common.UsageError(f"--schedule-start {args.schedule_start} needs --init, the network "
                                "after these epochs")
    end = args.schedule_start + args.epochs
    if end > args.schedule_epochs:
        raise common.UsageError(f"--schedule-epochs {args.schedule_epochs} is too short: this run "
                                f"ends with epoch {end} (--schedule-start + --epochs)")


def learning_rate(args, epoch, step_share):
    """The rate at an epoch of the schedule, from 0, of which the share `step_share` is done."""
    if args.schedule == "onecycle":
        return args.lr * common.one_cycle((epoch + step_share) / args.schedule_epochs)
    quarters_done = 4 * epoch // args.schedule_epochs
    return args.lr * 0.2 ** quarters_done


def tell(run, reads, args, defaults, train, val, probed):
    """Print what runs and what the columns are. probed: how many images masking is watched on."""
    eps = common.shown(args.eps)
    pgd = f"pgd-{defaults['attack_steps']}"
    attacks = (f"ifgsm-3 (3 steps), fgsm, {pgd} (step {common.shown(defaults['step_size'])}): "
               f"under attack at eps {eps}")
    if probed < len(val.labels):
        attacks += f"; fgsm and {pgd} see {probed} images"
    run.tell(reads, train, val, attacks, renamed={"val/pgd": pgd})


def main():
    # One line per method. A flag that only other methods' lines read is refused. The lines run
    # later: args, model and the like are set below.
    losses = {
        "nt": lambda x, y: nt_loss(model, x, y),
        "fgsm-at": lambda x, y: fgsm_at_loss(
            model, x, y, args.eps, args.fgsm_eps == "random", args.attack_mode),
        "rfgsm-at": lambda x, y: rfgsm_at_loss(
            model, x, y, args.eps, args.rfgsm_alpha, args.attack_mode),
        "eat": lambda x, y: eat_loss(model, sources, x, y, args.eps, args.attack_mode),
        "pgd-at": lambda x, y: pgd_at_loss(
            model, x, y, args.eps, args.step_size, args.attack_steps, args.attack_mode),
        "trades": lambda x, y: trades_loss(
            model, x, y, args.eps, args.lam, args.step_size, args.attack_steps, args.attack_mode),
        "r1": lambda x, y: r1_loss(
            model, x, y, args.eps, args.lam, args.attack_steps, args.k, args.ce_all,
            args.attack_mode),
        "r2": lambda x, y: r2_loss(
            model, x, y, args.eps, args.lam, args.rfgsm_alpha, args.ce_all, args.attack_mode),
        "r3": lambda x, y: r3_loss(
            model, x, y, args.eps, args.lam, args.eps_low, args.tau,
            args.rfgsm_alpha if args.r3_noise else 0.0, args.ce_all, args.attack_mode),
    }
    args, facts, defaults = parse(losses)
    device, precision = common.set_up(args.device, args.precision, tf32=args.tf32)
    train, val = common.load_train(facts, args.data_dir, args.val, args.limit, device, args.workers)
    probe = next(common.eval_batches(val)) if args.val else None  # images to watch masking on

    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, facts, args.normalize, device)
    sources = [common.load_model(path, device=device, facts=facts, architecture=args.model)[0]
               for path in args.source]
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay, fused=True)
    run = common.Run(__file__, args, defaults, facts, precision)
    first = run.start(model, optimizer, "val/clean" if args.method == "nt" else "val/ifgsm-3")
    tell(run, common.flags_read(losses[args.method]), args, defaults, train, val,
         len(probe[1]) if probe else 0)
    batch_size = min(args.batch_size, len(train.labels))
    cost = step_cost(args.method, batch_size, args.attack_steps, args.k)
    if cost:
        print(f"cost: {cost['cost/passes']:.4g} forward-backward passes of a batch for each step, "
              f"{cost['cost/attack']:.4g} of them for the attack")

    steps = common.steps_per_epoch(len(train.labels), args.batch_size)
    for epoch in range(first, args.epochs):
        started = time.perf_counter()
        meter = common.Meter(epoch)
        model.train()
        batches = common.train_batches(
            train, args.batch_size, args.seed, epoch, args.augment, args.schedule_start)
        for step, (x, y, _) in enumerate(batches):
            lr = learning_rate(args, args.schedule_start + epoch, (step + 0.5) / steps)
            common.set_lr(optimizer, lr)
            with common.autocast(device, run.precision):
                terms = losses[args.method](x, y)
            common.update(optimizer, terms["loss"], len(x))
            meter.add(len(x), terms)

        common.average_buffers(model.net)
        row = {"epoch": epoch + 1, "lr": lr}
        row |= {f"train/{name}": value for name, value in meter.read().items()}
        row["seconds"] = time.perf_counter() - started
        row |= cost
        if probe:
            with common.autocast(device, run.precision):
                row["val/clean"] = common.accuracy(model, val)
                row["val/ifgsm-3"] = common.accuracy(
                    model, val, attack=lambda x, y: common.ifgsm(model, x, y, args.eps, 3))
                common.seed_stream(args.seed, "probe", args.schedule_start + epoch)
                row |= masking_signals(model, *probe[:2], args.eps, defaults["rfgsm_alpha"],
                                       defaults["step_size"], defaults["attack_steps"])
        run.finish_epoch(model, optimizer, row)
        if probe and args.method != "nt":
            announce_masking(run.history)
    run.close()


if __name__ == "__main__":
    common.cli(main)
