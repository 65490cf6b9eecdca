"""SAT-Rx: single-step adversarial training with three regularisers against gradient masking.

Vivek and Babu, "Regularizers for Single-step Adversarial Training", 2020. FGSM samples alone teach a network to mask
its gradient; each regulariser penalises a symptom of masking, so that training needs no iterative attack (R1: on one
sample of the batch alone):
    R1, R2:  CE(x_fgsm) + lambda * mean ||g(x_fgsm) - g(x_other)||^2      other: IFGSM for one sample, R-FGSM for all
    R3:      loss_high + lambda * max(0, loss_low - tau * loss_high)      FGSM at eps and at a smaller eps

    python sat_rx.py --method r2 --dataset digits               # bundled real digits: no download, a minute on a CPU
    python sat_rx.py --method r2 --dataset mnist                # the paper's settings: LeNet+, 20 epochs, eps 0.3
    python sat_rx.py --method r3 --dataset mnist --init r1.pt   # table 9: goes on from another method's weights
"""

import time

import torch

import common

# The paper's settings (section 5, table 8). lr, batch size, weight decay, momentum, validation size, eps_low and
# rfgsm_alpha are those of the authors' code for R1 to R3: the text leaves them out, and the baselines take them, too.
# PGD's step is the evaluation's. `digits` is a smoke test, its settings are ours.
CIFAR10 = dict(model="wrn-28-10", normalize="none", epochs=100, batch_size=64, lr=0.1, weight_decay=5e-4, momentum=0.9,
               val=10_000, eps=8 / 255, eps_low=2 / 255, rfgsm_alpha=2 / 255, attack_steps=7, step_size=2 / 255, k=1)
MNIST = dict(CIFAR10, model="lenet+", epochs=20, batch_size=32, lr=0.01, eps=0.3, eps_low=0.1, rfgsm_alpha=0.01,
             attack_steps=40, step_size=0.01)
DIGITS = dict(MNIST, epochs=12, lr=0.02, val=237, eps=0.1, eps_low=0.03, attack_steps=10, step_size=0.02)
IMAGENET100 = dict(CIFAR10, model="resnet18")
PAPER = {"cifar10": CIFAR10, "mnist": MNIST, "digits": DIGITS, "imagenet100": IMAGENET100}
METHOD = {
    "imagenet100": {"r1": dict(lam=0.05), "r2": dict(lam=3.0), "r3": dict(lam=1.0, tau=0.6), "trades": dict(lam=6.0)},
    "cifar10": {"r1": dict(lam=0.2), "r2": dict(lam=25.0), "r3": dict(lam=1.0, tau=0.6), "trades": dict(lam=6.0)},
    "mnist": {"r1": dict(lam=0.2), "r2": dict(lam=5.0), "r3": dict(lam=1.0, tau=0.4, lr=0.05), "trades": dict(lam=6.0)},
}
METHOD["digits"] = dict(METHOD["mnist"], r3=dict(lam=1.0, tau=0.4))
METHODS = {"nt": "normal training", "fgsm-at": "FGSM-AT", "rfgsm-at": "on R-FGSM samples alone, ablation R2-2",
           "eat": "FGSM-AT with samples of the --source networks too", "pgd-at": "PGD-AT", "trades": "TRADES",
           "r1": "FGSM samples near IFGSM ones", "r2": "near R-FGSM ones", "r3": "with a loss that grows with eps"}
USES = {"lam": ("r1", "r2", "r3", "trades"), "tau": ("r3",), "k": ("r1",), "attack_steps": ("r1", "pgd-at", "trades"),
        "step_size": ("pgd-at", "trades"), "eps_low": ("r3",), "r3_noise": ("r3",), "ce_all": ("r1", "r2", "r3"),
        "source": ("eat",)}  # flag -> the methods that read it

# Differences from the paper
# - Attacks see BatchNorm in eval mode (--attack-mode train: the other), as in the authors' code.
# - R1 trains on one forward pass of m + k images, R2 and R3 on one of 2m, as in the authors' code.
# - R-FGSM is eqs. 2 and 3 as printed; R2 of the authors' code steps by eps, not eps - alpha, and so leaves the ball.
# - R3 starts from the clean image; the authors' code from the image after R-FGSM's random step, which leaves the ball
#   by alpha: --r3-noise does so too.
# - R1's IFGSM takes the 40 (MNIST) and 7 (CIFAR-10) steps of table 8; the authors' code takes 10 and 3: --attack-steps.
# - lr falls by 5 after 1/4, 1/2 and 3/4 of the epochs; the authors' code drops it one epoch later. Each phase of table
#   9's sequential training (--init) has a schedule of its own; the paper prints none.
# - FGSM-AT and EAT train on one forward pass of clean and FGSM images, TRADES on one of each. EAT replaces half of the
#   batch, as FGSM-AT does, by samples of one network, drawn per batch: of a source or of the model itself.
# - The best epoch is that of the highest accuracy under IFGSM-3 on held-out images, as in the authors' code; that of
#   normal training, which withstands no IFGSM, has the highest clean accuracy.
# - PGD-AT and the PGD on held-out images start in the whole ball, not within a step of x as in eq. 6.
# - The signals of figs. 1, 2 and 6 are taken once per epoch, on 500 held-out images, 50 of ImageNet's.
# - WRN is the standard one; the authors' has its stride in the second convolution, biases, Xavier's initialisation,
#   shortcuts from before the activation and a last BatchNorm of momentum 0.9.
# - ImageNet's images have 224 pixels; the paper does not print how many, nor which 100 classes.
# - bfloat16 where the hardware has it, also for the attacks that choose the best epoch; evaluate.py is in float32.
# - TRADES: 1/lambda = 6 (--lam) and a Gaussian start of deviation 0.001, its own authors' values; the paper has none.


def parse(argv=None):
    """The resolved flags; argv as in argparse."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, PAPER)
    flag = parser.add_argument
    flag("--method", choices=list(METHODS), default="r2",
         help="; ".join(f"{name}: {what}" for name, what in METHODS.items()) + " (%(default)s)")
    flag("--lam", type=common.number(0), help="lambda, the regulariser's weight (the paper's); 1/lambda of TRADES (6)")
    flag("--tau", type=common.number(0, 1), help="R3: loss at eps-low stays below tau times that at eps (the paper's)")
    flag("--k", type=common.count, help="R1: pairs of FGSM and IFGSM samples of a batch (the paper's: 1)")
    flag("--attack-steps", type=common.count, help="steps of R1's IFGSM, of PGD-AT and of TRADES (the paper's)")
    flag("--step-size", type=common.unit, help="step of PGD-AT's and TRADES's PGD, in [0, 1] units (the paper's of "
         "evaluation)")
    flag("--rfgsm-alpha", type=common.unit, help="R-FGSM's first, random step (the authors', at most eps / 2)")
    flag("--eps-low", type=common.unit, help="R3: the smaller radius (the authors')")
    flag("--r3-noise", action="store_true", help="R3: start from the image after R-FGSM's random step, clipped")
    flag("--ce-all", action="store_true", help="r1, r2, r3: cross-entropy on the regulariser's samples too; with --lam "
         "0 ablations R1-1, R2-1, R3-2, with --k (13 of 32: 40 %%) also R1-3; --method r3 --lam 0 alone is R3-1")
    flag("--source", metavar="CKPT", action="append", default=[], help="EAT: a network that also makes FGSM samples, "
         "drawn per batch; may be repeated")
    common.workers_flag(parser)
    args = parser.parse_args(argv)
    common.refuse_unused(args, "method", USES)
    if args.method == "eat" and not args.source:
        raise common.UsageError("--method eat needs --source CKPT, once or more")
    eps, settings = args.eps or PAPER[args.dataset]["eps"], dict(lam=0.0, tau=1.0)
    settings |= {**PAPER[args.dataset], **METHOD[args.dataset].get(args.method, {})}
    common.resolve(args, dict(settings, rfgsm_alpha=min(settings["rfgsm_alpha"], eps / 2)))
    if args.rfgsm_alpha >= eps:
        raise common.UsageError(f"--rfgsm-alpha ({args.rfgsm_alpha:g}) must be below --eps ({eps:g})")
    if args.method == "r3" and args.eps_low >= eps:
        raise common.UsageError(f"--eps-low ({args.eps_low:g}) must be below --eps ({eps:g})")
    return args


def baseline_loss(model, x, y, args, sources=()):
    """The losses that the paper compares with (section 3.2), on x (m, C, H, W), y (m,), as named scalars."""
    method, eps, options, m = args.method, args.eps, dict(mode=args.attack_mode), len(x)
    if method in ("fgsm-at", "eat"):  # half of the batch is replaced
        crafter = [model, *sources][torch.randint(1 + len(sources), ()).item()]
        options = options if crafter is model else {}  # sources stay in eval mode
        x_fgsm = common.fgsm(crafter, x[:m // 2], y[:m // 2], eps, **options) if m > 1 else x[:0]
        x = torch.cat([x_fgsm, x[m // 2:]])
    if method == "rfgsm-at":
        x = common.rfgsm(model, x, y, eps, args.rfgsm_alpha, **options)
    if method == "pgd-at":
        x = common.pgd(model, x, y, eps, args.step_size, args.attack_steps, **options)
    logits = model(x)
    ce = common.cross_entropy(logits, y).mean()
    if method == "trades":  # CE(x) + 1/lambda KL(p(x) || p(x')), x' maximises the KL
        with torch.no_grad(), common.model_mode(model, args.attack_mode):
            reference = model(x)
        x_adv = common.pgd(model, x, reference, eps, args.step_size, args.attack_steps, common.gaussian_start,
                           loss=common.kl, **options)
        reg = common.kl(model(x_adv), logits).mean()
        return dict(loss=ce + args.lam * reg, ce=ce, reg=reg)
    return dict(loss=ce)


def sat_loss(model, x, y, args):
    """Eqs. 14 to 16 on x (m, C, H, W), y (m,), as named scalars; "loss" is the one to minimise."""
    method, eps, m, options = args.method, args.eps, len(x), dict(mode=args.attack_mode)

    # Eq. 14:  1/m sum J(f(x_fgsm), y) + lambda 1/k sum ||g(x_fgsm) - g(x_ifgsm)||^2, on the last k samples
    if method == "r1":
        k = min(args.k, m)
        x_fgsm, y_other = common.fgsm(model, x, y, eps, **options), y[-k:]
        x_ifgsm = common.ifgsm(model, x[-k:], y_other, eps, args.attack_steps, **options)
        g_fgsm, g_other = model(torch.cat([x_fgsm, x_ifgsm])).split([m, k])
        ce = common.cross_entropy(g_fgsm, y).mean()
        reg = (g_fgsm[-k:] - g_other).square().sum(1).mean()

    # Eq. 15:  1/m sum J(f(x_fgsm), y) + lambda 1/m sum ||g(x_fgsm) - g(x_rfgsm)||^2
    if method == "r2":
        x_fgsm, y_other = common.fgsm(model, x, y, eps, **options), y
        x_rfgsm = common.rfgsm(model, x, y, eps, args.rfgsm_alpha, **options)
        g_fgsm, g_other = model(torch.cat([x_fgsm, x_rfgsm])).split(m)
        ce = common.cross_entropy(g_fgsm, y).mean()
        reg = (g_fgsm - g_other).square().sum(1).mean()

    # Eq. 16:  loss_high + lambda max(0, loss_low - tau loss_high), both along one gradient sign
    if method == "r3":
        if args.r3_noise:
            x = (x + args.rfgsm_alpha * torch.randn_like(x).sign()).clamp(0, 1)
        with common.model_mode(model, args.attack_mode):
            sign = common.input_gradient(model, x, y)[0].sign()
        x_high, x_low, y_other = (x + eps * sign).clamp(0, 1), (x + args.eps_low * sign).clamp(0, 1), y
        g_fgsm, g_other = model(torch.cat([x_high, x_low])).split(m)
        ce, loss_low = common.cross_entropy(g_fgsm, y).mean(), common.cross_entropy(g_other, y).mean()
        reg = (loss_low - args.tau * ce).clamp(min=0)

    if args.ce_all:  # ablations (section 5.3): the regulariser's samples as mere training samples
        ce = common.cross_entropy(torch.cat([g_fgsm, g_other]), torch.cat([y, y_other])).mean()
    return dict(loss=ce + args.lam * reg, ce=ce, reg=reg)


def masking_signals(model, x, y, args):
    """What figs. 1 and 2 watch, on held-out images: mean L2 distances between the logits of FGSM samples and those of
    IFGSM and R-FGSM samples, the mean loss on PGD minus that on FGSM samples, and both accuracies."""
    paper = PAPER[args.dataset]
    steps, step = paper["attack_steps"], paper["step_size"] * args.eps / paper["eps"]
    with common.model_mode(model, "eval"):
        attacked = [common.fgsm(model, x, y, args.eps), common.ifgsm(model, x, y, args.eps, steps),
                    common.rfgsm(model, x, y, args.eps, args.rfgsm_alpha),
                    common.pgd(model, x, y, args.eps, step, steps)]
        with torch.no_grad():
            fgsm, ifgsm, rfgsm, pgd = (model(x_adv) for x_adv in attacked)
    rows = {"val/fgsm": (fgsm.argmax(1) == y).float(), f"val/pgd-{steps}": (pgd.argmax(1) == y).float(),
            "masking/l2_ifgsm": (fgsm - ifgsm).norm(dim=1), "masking/l2_rfgsm": (fgsm - rfgsm).norm(dim=1),
            "masking/loss_gap": common.cross_entropy(pgd, y) - common.cross_entropy(fgsm, y)}
    return {name: value.mean().item() for name, value in rows.items()}


def announce_masking(history, pgd):
    """Say so when FGSM no longer finds what PGD finds, more than 20 points between them, and when it does again."""
    masked = [False, *(row["val/fgsm"] - row[pgd] > 0.2 for row in history)]
    if masked[-1] != masked[-2]:
        print(f"gradient masking {'sets in' if masked[-1] else 'is over'}: {100 * history[-1]['val/fgsm']:.0f} % of "
              f"held-out images survive FGSM, {100 * history[-1][pgd]:.0f} % {pgd[4:].upper()}", flush=True)


def main():
    args = parse()
    device, precision = common.set_up(args.device, args.precision)
    run = common.Run("sat_rx", dict(vars(args), precision=precision), device)
    train, val = common.load_train(args.dataset, args.data_dir, args.val, args.limit, device, args.workers)
    probe = next(common.eval_batches(val)) if args.val else None  # held-out images to watch masking on

    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, args.dataset, args.normalize, device)
    sources = [common.load_model(path, device=device, dataset=args.dataset)[0] for path in args.source]
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)

    for epoch in range(run.restore(model, optimizer), args.epochs):
        started, meter = time.perf_counter(), common.Meter(epoch)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.2 ** (4 * epoch // args.epochs)
        model.train()
        augment = common.DATASETS[args.dataset]["augment"]
        for x, y, _ in common.train_batches(train, args.batch_size, args.seed, epoch, augment):
            with common.autocast(device, precision):
                terms = sat_loss(model, x, y, args) if args.method in ("r1", "r2", "r3") else \
                    baseline_loss(model, x, y, args, sources)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            meter.add(len(x), terms)

        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
        row |= {f"train/{name}": value for name, value in meter.read().items()}
        row["seconds"] = time.perf_counter() - started
        if probe:
            with common.autocast(device, precision):
                ifgsm3 = common.accuracy(model, val, attack=lambda x, y: common.ifgsm(model, x, y, args.eps, 3))
                row |= {"val/clean": common.accuracy(model, val), "val/ifgsm-3": ifgsm3}
                common.seed_stream(args.seed, "probe", epoch)
                row |= masking_signals(model, *probe[:2], args)
        run.finish_epoch(model, optimizer, row, row.get("val/clean" if args.method == "nt" else "val/ifgsm-3"))
        if probe and args.method != "nt":
            announce_masking(run.history, f"val/pgd-{PAPER[args.dataset]['attack_steps']}")
    run.close()


if __name__ == "__main__":
    common.cli(main)
