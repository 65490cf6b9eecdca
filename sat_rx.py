"""SAT-Rx: single-step adversarial training with three regularisers against gradient masking.

Vivek and Babu, "Regularizers for Single-step Adversarial Training", 2020. FGSM samples alone teach a network to mask its
gradient; each regulariser penalises a symptom of masking, so that training needs no iterative attack:
    R1, R2:  CE(x_fgsm) + lambda * mean ||g(x_fgsm) - g(x_other)||^2      other: IFGSM for one sample, R-FGSM for all
    R3:      loss_high + lambda * max(0, loss_low - tau * loss_high)      FGSM at eps and at a smaller eps

    python sat_rx.py --method r2 --dataset digits        # bundled real digits: no download, under a minute on a CPU
    python sat_rx.py --method r2 --dataset mnist         # the paper's settings: LeNet+, 20 epochs, eps 0.3
"""

import time

import torch

import common

# The paper's settings (section 5, tables 1 and 8); lr, batch, weight decay, momentum and validation size are those of the
# authors' code, which the text leaves out. `digits` is a smoke test, its settings are ours.
CIFAR10 = dict(model="wrn-28-10", normalize="none", epochs=100, batch_size=64, lr=0.1, weight_decay=5e-4, momentum=0.9,
               val=10_000, eps=8 / 255, eps_low=2 / 255, rfgsm_alpha=2 / 255, attack_steps=7, k=1)
MNIST = dict(CIFAR10, model="lenet+", epochs=20, batch_size=32, lr=0.01, eps=0.3, eps_low=0.1, rfgsm_alpha=0.01,
             attack_steps=40)
DIGITS = dict(MNIST, epochs=12, lr=0.02, val=237, eps=0.1, eps_low=0.03, rfgsm_alpha=0.01, attack_steps=10)
PAPER = {"cifar10": CIFAR10, "mnist": MNIST, "digits": DIGITS}
METHOD = {  # what differs between the methods: lambda, tau, lr
    "cifar10": {"r1": dict(lam=0.2), "r2": dict(lam=25.0), "r3": dict(lam=1.0, tau=0.6)},
    "mnist": {"r1": dict(lam=0.2), "r2": dict(lam=5.0), "r3": dict(lam=1.0, tau=0.4, lr=0.05)},
}
METHOD["digits"] = METHOD["mnist"]

# Differences from the paper
# - Attacks see BatchNorm in eval mode (--attack-mode train: the other), as in the authors' code.
# - R1 trains on one forward pass of m + k images, R2 and R3 on one of 2m, as in the authors' code.
# - R-FGSM is eqs. 2 and 3 as printed; the authors' code steps by eps, not eps - alpha, and so leaves the ball.
# - R3 takes its one gradient at the clean image; the authors' code at the image plus R-FGSM noise: --r3-noise.
# - lr falls by 5 after 1/4, 1/2 and 3/4 of the epochs; the authors' code drops it one epoch later.


def parse(argv=None):
    """The resolved flags; argv as in argparse."""
    parser = common.Parser(__doc__)
    common.shared_flags(parser, PAPER)
    flag = parser.add_argument
    flag("--method", choices=["nt", "fgsm-at", "r1", "r2", "r3"], default="r2", help="normal training, FGSM adversarial "
         "training, or single-step adversarial training with regulariser 1, 2 or 3 (%(default)s)")
    flag("--lam", type=common.number(0), help="lambda, the regulariser's weight (the paper's)")
    flag("--tau", type=common.number(0, 1), help="R3: loss at eps-low stays below tau times that at eps (the paper's)")
    flag("--k", type=common.count, help="R1: pairs of FGSM and IFGSM samples per step (the paper's: 1)")
    flag("--attack-steps", type=common.count, help="steps of R1's IFGSM and of the validation PGD (the paper's)")
    flag("--rfgsm-alpha", type=common.unit, help="R2: R-FGSM's first, random step (the paper's)")
    flag("--eps-low", type=common.unit, help="R3: the smaller radius (the paper's)")
    flag("--r3-noise", action="store_true", help="R3: take the gradient after R-FGSM's random step, clipped")
    args = parser.parse_args(argv)
    settings = dict(lam=0.0, tau=1.0)
    return common.resolve(args, {**settings, **PAPER[args.dataset], **METHOD[args.dataset].get(args.method, {})})


def sat_loss(model, x, y, args):
    """The training loss on a batch x (m, C, H, W), y (m,), as named scalars; "loss" is the one to minimise."""
    method, eps, mode, m = args.method, args.eps, args.attack_mode, len(x)
    if method == "nt":
        return dict(loss=common.cross_entropy(model(x), y).mean())

    # FGSM-AT (section 3.2): half of the batch is replaced
    if method == "fgsm-at":
        x_fgsm = common.fgsm(model, x[:m // 2], y[:m // 2], eps, mode=mode) if m > 1 else x[:0]
        return dict(loss=common.cross_entropy(model(torch.cat([x_fgsm, x[m // 2:]])), y).mean())

    # Eq. 14:  1/m sum J(f(x_fgsm), y) + lambda 1/k sum ||g(x_fgsm) - g(x_ifgsm)||^2, on the last k samples
    if method == "r1":
        k = min(args.k, m)
        x_fgsm = common.fgsm(model, x, y, eps, mode=mode)
        x_ifgsm = common.ifgsm(model, x[-k:], y[-k:], eps, args.attack_steps, mode=mode)
        g_fgsm, g_ifgsm = model(torch.cat([x_fgsm, x_ifgsm])).split([m, k])
        ce = common.cross_entropy(g_fgsm, y).mean()
        reg = (g_fgsm[-k:] - g_ifgsm).square().sum(1).mean()

    # Eq. 15:  1/m sum J(f(x_fgsm), y) + lambda 1/m sum ||g(x_fgsm) - g(x_rfgsm)||^2
    if method == "r2":
        x_fgsm = common.fgsm(model, x, y, eps, mode=mode)
        x_rfgsm = common.rfgsm(model, x, y, eps, args.rfgsm_alpha, mode=mode)
        g_fgsm, g_rfgsm = model(torch.cat([x_fgsm, x_rfgsm])).split(m)
        ce = common.cross_entropy(g_fgsm, y).mean()
        reg = (g_fgsm - g_rfgsm).square().sum(1).mean()

    # Eq. 16:  loss_high + lambda max(0, loss_low - tau loss_high), both along one gradient sign
    if method == "r3":
        noise = args.rfgsm_alpha * torch.randn_like(x).sign() if args.r3_noise else 0
        with common.model_mode(model, mode):
            sign = common.input_gradient(model, (x + noise).clamp(0, 1), y)[0].sign()
        x_low, x_high = (x + args.eps_low * sign).clamp(0, 1), (x + eps * sign).clamp(0, 1)
        g_low, g_high = model(torch.cat([x_low, x_high])).split(m)
        loss_low, ce = common.cross_entropy(g_low, y).mean(), common.cross_entropy(g_high, y).mean()
        reg = (loss_low - args.tau * ce).clamp(min=0)

    return dict(loss=ce + args.lam * reg, ce=ce, reg=reg)


def masking_signals(model, x, y, args):
    """What figs. 1 and 2 watch, on held-out images: mean L2 distances between the logits of FGSM samples and those of
    IFGSM and R-FGSM samples, the mean loss on PGD minus that on FGSM samples, and both accuracies."""
    steps = args.attack_steps
    with common.model_mode(model, "eval"):
        attacked = [common.fgsm(model, x, y, args.eps), common.ifgsm(model, x, y, args.eps, steps),
                    common.rfgsm(model, x, y, args.eps, args.rfgsm_alpha),
                    common.pgd(model, x, y, args.eps, common.DATASETS[args.dataset]["step"], steps)]
        with torch.no_grad():
            fgsm, ifgsm, rfgsm, pgd = (model(x_adv) for x_adv in attacked)
    rows = {"val/fgsm": (fgsm.argmax(1) == y).float(), f"val/pgd-{steps}": (pgd.argmax(1) == y).float(),
            "masking/l2_ifgsm": (fgsm - ifgsm).norm(dim=1), "masking/l2_rfgsm": (fgsm - rfgsm).norm(dim=1),
            "masking/loss_gap": common.cross_entropy(pgd, y) - common.cross_entropy(fgsm, y)}
    return {name: value.mean().item() for name, value in rows.items()}


def announce_masking(history, pgd):
    """Say so in the first epoch in which FGSM no longer finds what PGD finds: more than 20 points between them."""
    masked = [row["val/fgsm"] - row[pgd] > 0.2 for row in history]
    if masked[-1] and not any(masked[:-1]):
        print(f"gradient masking sets in: {100 * history[-1]['val/fgsm']:.0f} % survive FGSM, {100 * history[-1][pgd]:.0f} % "
              f"{pgd[4:].upper()} (section 4.2)", flush=True)


def main():
    args = parse()
    device, precision = common.set_up(args.device, args.precision)
    run = common.Run("sat_rx", dict(vars(args), precision=precision))
    train, val = common.load_train(args.dataset, args.data_dir, args.val, args.limit, device)
    probe = next(common.eval_batches(val, 500)) if args.val else None  # the held-out images on which masking is watched

    common.seed_stream(args.seed, "init")
    model = common.build_model(args.model, args.dataset, args.normalize, device)
    if args.init:
        common.load_weights(model, common.load_checkpoint(args.init)["best"]["state_dict"], args.init)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)

    for epoch in range(run.restore(model, optimizer), args.epochs):
        started, meter = time.perf_counter(), common.Meter(epoch)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * 0.2 ** (4 * epoch // args.epochs)
        model.train()
        augment = common.DATASETS[args.dataset]["augment"]
        for x, y, _ in common.train_batches(train, args.batch_size, args.seed, epoch, augment):
            with common.autocast(device, precision):
                terms = sat_loss(model, x, y, args)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            meter.add(len(x), terms)

        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
        row |= {f"train/{name}": value for name, value in meter.read().items()}
        row["seconds"] = time.perf_counter() - started
        if probe:
            with common.autocast(device, precision):
                ifgsm3 = common.correct(model, val, attack=lambda x, y: common.ifgsm(model, x, y, args.eps, 3))
                row |= {"val/clean": common.correct(model, val).float().mean().item(),
                        "val/ifgsm-3": ifgsm3.float().mean().item()}
                common.seed_stream(args.seed, "probe", epoch)
                row |= masking_signals(model, *probe[:2], args)
        run.finish_epoch(model, optimizer, row, metric=row.get("val/ifgsm-3"))
        if probe and args.method != "nt":
            announce_masking(run.history, f"val/pgd-{args.attack_steps}")
    run.close()


if __name__ == "__main__":
    common.cli(main)
