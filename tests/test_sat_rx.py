"""The losses of sat_rx.py against independent formulas, their gradients against finite differences, the settings."""

import pytest
import torch

import common
import evaluate
import sat_rx
from conftest import check_slopes, plain


def small(method, *flags, seed=0):
    """(float64 network, images, labels, flags): smooth enough for finite differences."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 20), torch.nn.Tanh(), torch.nn.Linear(20, 4))
    for p in net.parameters():
        p.data *= 3  # bends the loss surface: FGSM and IFGSM samples must differ
    args = sat_rx.parse(["--method", method, "--dataset", "mnist", *flags])
    return plain(net.double()), torch.rand(6, 1, 6, 6).double(), torch.randint(0, 4, (6,)), args


def loss_of(model, x, y, args):
    """The function that main() picks."""
    return (sat_rx.sat_loss if args.method in ("r1", "r2", "r3") else sat_rx.baseline_loss)(model, x, y, args)


def ce(model, x, y):
    """Cross-entropy per sample, written out."""
    z = model(x)
    return z.exp().sum(1).log() - z[torch.arange(len(y)), y]


def sign_of_gradient(model, x, y):
    """Sample by sample."""
    signs = []
    for i in range(len(x)):
        point = x[i:i + 1].clone().requires_grad_(True)
        signs.append(torch.autograd.grad(ce(model, point, y[i:i + 1]).sum(), point)[0].sign())
    return torch.cat(signs)


def by_formula(model, x, y, args):
    """Eqs. 14, 15 and 16, term by term, sample by sample."""
    m, eps = len(x), args.eps
    sign = sign_of_gradient(model, x, y)
    x_fgsm = (x + eps * sign).clamp(0, 1)
    if args.method == "nt":
        return ce(model, x, y).mean()
    if args.method == "fgsm-at":
        return ce(model, torch.cat([x_fgsm[:m // 2], x[m // 2:]]), y).mean()
    if args.method in ("rfgsm-at", "r2"):
        noisy = x + args.rfgsm_alpha * torch.randn_like(x).sign()
        x_rfgsm = (noisy + (eps - args.rfgsm_alpha) * sign_of_gradient(model, noisy, y)).clamp(0, 1)
        if args.method == "rfgsm-at":
            return ce(model, x_rfgsm, y).mean()
    if args.method == "pgd-at":
        other = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        for _ in range(args.attack_steps):
            other = other + args.step_size * sign_of_gradient(model, other, y)
            other = torch.minimum(torch.maximum(other, x - eps), x + eps).clamp(0, 1)
        return ce(model, other, y).mean()
    first = sum(ce(model, x_fgsm[i:i + 1], y[i:i + 1]).sum() for i in range(m)) / m
    if args.method == "r1":
        other, k = x[-args.k:], args.k
        for _ in range(args.attack_steps):
            other = other + eps / args.attack_steps * sign_of_gradient(model, other, y[-k:])
            other = torch.minimum(torch.maximum(other, x[-k:] - eps), x[-k:] + eps).clamp(0, 1)
        second = sum((model(x_fgsm[m - k + j][None]) - model(other[j][None])).pow(2).sum() for j in range(k)) / k
    if args.method == "r2":
        second = sum((model(x_fgsm[j][None]) - model(x_rfgsm[j][None])).pow(2).sum() for j in range(m)) / m
    if args.method == "r3":
        x_low = (x + args.eps_low * sign).clamp(0, 1)
        second = max(torch.zeros(()), ce(model, x_low, y).mean() - args.tau * first)
    return first + args.lam * second


CASES = [("nt",), ("fgsm-at",), ("rfgsm-at",), ("pgd-at", "--attack-steps", "4"), ("r1",), ("r2",), ("r3",),
         ("r1", "--k", "3", "--attack-steps", "4"), ("r2", "--lam", "25")]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_loss_equals_the_formula(case):
    model, x, y, args = small(*case)
    torch.manual_seed(5)
    ours = loss_of(model, x, y, args)
    torch.manual_seed(5)
    torch.testing.assert_close(ours["loss"], by_formula(model, x, y, args))
    if "reg" in ours:
        assert ours["reg"] > 1e-3, "the regulariser is not exercised"
        torch.testing.assert_close(ours["loss"], ours["ce"] + args.lam * ours["reg"])


@pytest.mark.parametrize("case", CASES + [("trades", "--attack-steps", "4")], ids=" ".join)
def test_gradient_by_finite_differences(case):
    """d loss / d weights along random directions, in float64: no term has lost its gradient."""
    model, x, y, args = small(*case)

    def loss():
        torch.manual_seed(5)
        return loss_of(model, x, y, args)
    check_slopes(model, loss, rel=1e-4)


def test_degenerate_settings():
    """lambda = 0 leaves CE on FGSM samples; R3's hinge is zero where the loss grows by more than tau asks."""
    for method in ("r1", "r2", "r3"):
        model, x, y, args = small(method, "--lam", "0")
        ours = sat_rx.sat_loss(model, x, y, args)
        torch.testing.assert_close(ours["loss"], ce(model, common.fgsm(model, x, y, args.eps), y).mean())
    model, x, y, args = small("r3", "--tau", "1")
    ours = sat_rx.sat_loss(model, x, y, args)
    assert ours["reg"] == 0 and ours["loss"] == ours["ce"]


def test_a_batch_of_one_and_k_above_it():
    for method in sat_rx.METHODS.keys() - {"eat"}:
        model, x, y, args = small(method, *(["--k", "4"] if method == "r1" else []))
        assert loss_of(model, x[:1], y[:1], args)["loss"].isfinite()


def test_trades():
    """CE(x) + 6 KL(p(x) || p(x')): the KL against torch's own, at an adversary in the ball that raises it."""
    model, x, y, args = small("trades")
    torch.manual_seed(5)
    ours = sat_rx.baseline_loss(model, x, y, args)
    torch.testing.assert_close(ours["ce"], ce(model, x, y).mean())
    torch.testing.assert_close(ours["loss"], ours["ce"] + 6 * ours["reg"])
    p, kls = torch.distributions.Categorical(logits=model(x)), []
    for _ in range(50):
        q = torch.distributions.Categorical(logits=model((x + args.eps * torch.randn_like(x).sign()).clamp(0, 1)))
        kls.append(torch.distributions.kl_divergence(p, q).mean().item())
    assert ours["reg"].item() > max(kls) > 0


def test_ablations():
    """Section 5.3: --ce-all trains on the regulariser's samples too; --r3-noise starts from the noised image."""
    model, x, y, args = small("r3", "--lam", "0", "--ce-all")
    sign = sign_of_gradient(model, x, y)
    both = torch.cat([(x + 0.3 * sign).clamp(0, 1), (x + 0.1 * sign).clamp(0, 1)])
    torch.testing.assert_close(sat_rx.sat_loss(model, x, y, args)["loss"], ce(model, both, torch.cat([y, y])).mean())
    model, x, y, args = small("r1", "--lam", "0", "--ce-all", "--k", "2")
    x_ifgsm = common.ifgsm(model, x[-2:], y[-2:], 0.3, 40)
    both = torch.cat([common.fgsm(model, x, y, 0.3), x_ifgsm])
    expected = ce(model, both, torch.cat([y, y[-2:]])).mean()
    torch.testing.assert_close(sat_rx.sat_loss(model, x, y, args)["loss"], expected)
    model, x, y, args = small("r3", "--r3-noise")
    torch.manual_seed(5)
    noised = (x + 0.01 * torch.randn_like(x).sign()).clamp(0, 1)
    without = small("r3")[3]
    torch.manual_seed(5)
    torch.testing.assert_close(sat_rx.sat_loss(model, x, y, args)["loss"],
                               sat_rx.sat_loss(model, noised, y, without)["loss"])


def test_eat_draws_its_source_per_batch():
    """Over many batches the FGSM samples come from the model and from both sources, each its own."""
    model, x, y, _ = small("nt")
    args = sat_rx.parse(["--method", "eat", "--dataset", "mnist", "--source", "a.pt", "--source", "b.pt"])
    crafters = [model, small("nt", seed=1)[0], small("nt", seed=2)[0]]
    expected = [ce(model, torch.cat([common.fgsm(c, x[:3], y[:3], 0.3), x[3:]]), y).mean().item() for c in crafters]
    seen = [sat_rx.baseline_loss(model, x, y, args, crafters[1:])["loss"].item() for _ in range(40)]
    assert {min(range(3), key=lambda i: abs(expected[i] - loss)) for loss in seen} == {0, 1, 2}
    assert all(min(abs(e - loss) for e in expected) < 1e-9 for loss in seen)
    for flags in (["--method", "eat"], ["--method", "nt", "--source", "a.pt"]):
        with pytest.raises(common.UsageError, match="--source"):
            sat_rx.parse(flags)


def test_paper_settings():
    """Section 5: lambda, tau, epochs, eps; flags win over the table."""
    expected = {("mnist", "r1"): (0.2, 20, 0.3, "lenet+"), ("mnist", "r2"): (5, 20, 0.3, "lenet+"),
                ("mnist", "r3"): (1, 20, 0.3, "lenet+"), ("cifar10", "r1"): (0.2, 100, 8 / 255, "wrn-28-10"),
                ("cifar10", "r2"): (25, 100, 8 / 255, "wrn-28-10"), ("cifar10", "r3"): (1, 100, 8 / 255, "wrn-28-10")}
    for (dataset, method), values in expected.items():
        args = sat_rx.parse(["--dataset", dataset, "--method", method])
        assert (args.lam, args.epochs, args.eps, args.model) == values
    assert sat_rx.parse(["--dataset", "mnist", "--method", "r3"]).tau == 0.4
    assert sat_rx.parse(["--dataset", "cifar10", "--method", "r3"]).tau == 0.6
    args = sat_rx.parse(["--dataset", "mnist", "--eps", "8/255", "--lam", "0"])
    assert (args.eps, args.lam) == (8 / 255, 0)


def test_masking_signals_tell_a_masked_network():
    """A network whose gradient points the wrong way at x and right after a step: FGSM fails, PGD does not."""
    class Kinked(torch.nn.Module):
        def forward(self, x):
            z = (x - 0.5).flatten(1).sum(1) * 4
            z = torch.where(z.abs() < 0.5, -z, z - z.sign())
            return torch.stack([z, -z], 1)
    args = sat_rx.parse(["--dataset", "digits"])
    x = torch.full((8, 1, 2, 2), 0.5) + 0.001
    y = torch.ones(8, dtype=torch.int64)
    masked = sat_rx.masking_signals(plain(Kinked()), x, y, args)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    sound = sat_rx.masking_signals(plain(linear), x, y, args)
    assert (masked["val/fgsm"], masked["val/pgd-10"]) == (1, 0) and masked["masking/loss_gap"] > 0.5
    assert masked["masking/l2_ifgsm"] > 0.5 and sound["masking/l2_ifgsm"] < 1e-3
    assert sound["masking/loss_gap"] == pytest.approx(0, abs=1e-3)


def test_masking_is_announced_when_it_sets_in_and_ends(capsys):
    sound, masked = {"val/fgsm": 0.8, "val/pgd-40": 0.75}, {"val/fgsm": 0.9, "val/pgd-40": 0.1}
    history, said = [], []
    for row in (sound, masked, masked, sound, sound):
        sat_rx.announce_masking(history := [*history, row], "val/pgd-40")
        said.append(capsys.readouterr().out)
    assert said[1] == "gradient masking sets in: 90 % of held-out images survive FGSM, 10 % PGD-40\n"
    assert said[3] == "gradient masking is over: 80 % of held-out images survive FGSM, 75 % PGD-40\n"
    assert not (said[0] or said[2] or said[4])


def test_flags_that_do_nothing_are_refused():
    for flags in (["--method", "nt", "--lam", "0"], ["--method", "r2", "--tau", "0.3"],
                  ["--method", "r1", "--r3-noise"], ["--method", "rfgsm-at", "--ce-all"],
                  ["--method", "r1", "--step-size", "0.1"]):
        with pytest.raises(common.UsageError, match="has no use for"):
            sat_rx.parse(flags)
    assert sat_rx.parse(["--method", "r2", "--lam", "0", "--ce-all"]).lam == 0


def test_settings_of_a_small_radius_and_of_imagenet100():
    args = sat_rx.parse(["--dataset", "cifar10", "--eps", "2/255", "--method", "pgd-at"])
    assert args.rfgsm_alpha == args.eps / 2
    args = sat_rx.parse(["--dataset", "imagenet100", "--method", "r3"])
    assert (args.model, args.epochs, args.lam, args.tau, 255 * args.eps) == ("resnet18", 100, 1, 0.6, 8)


def test_radii_out_of_order_are_refused():
    """R-FGSM's second step would descend, R3's penalty would compare a loss with itself."""
    for flags in (["--dataset", "cifar10", "--eps", "1/255", "--rfgsm-alpha", "2/255"],
                  ["--dataset", "mnist", "--method", "r3", "--eps", "0.1"]):
        with pytest.raises(common.UsageError, match="below --eps"):
            sat_rx.parse(flags)


def test_r2_is_more_robust_than_normal_training(train):
    """On digits, under PGD-40 at eps 0.1: the claim of the README's first command."""
    accuracy = {}
    for method in ("nt", "r2"):
        model, checkpoint = common.load_model(train(method))
        attack, = evaluate.parse_attacks("pgd-40", "digits", 0.1)
        test = evaluate.load_test("digits", "data", None, "cpu")
        accuracy[method] = evaluate.evaluate(model, test, attack, 360)[:, 0].mean()
        assert common.correct(model, test).float().mean() > 0.9
    assert accuracy["r2"] > accuracy["nt"] + 0.2
