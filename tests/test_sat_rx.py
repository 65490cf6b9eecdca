"""sat_rx.py: each loss against an independent formula, its gradient against finite differences.

Also the settings, the flags that are refused, and the signals that tell masked gradients.
"""

import pytest
import torch

import common
import evaluate
import sat_rx
from conftest import SmallNet, check_slopes, flags_of, method_loss, parse, plain, run_main


def small_net(seed=0):
    """A float64 network for images of 6 x 6 pixels, smooth enough for finite differences."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 20), torch.nn.Tanh(),
                              torch.nn.Linear(20, 4))
    for p in net.parameters():
        p.data *= 3  # bends the loss surface: FGSM and IFGSM samples must differ
    return plain(net.double())


def small(method, *words, sources=()):
    """(network, images, labels, flags, loss) with MNIST's settings.

    loss: what main() computes for --method, a function of images and labels.
    """
    model = small_net()
    args, loss = method_loss(sat_rx, "--method", method, "--dataset", "mnist", *words,
                             model=model, sources=sources)
    x = torch.rand(6, 1, 6, 6).double()
    y = torch.randint(0, 4, (6,))
    return model, x, y, args, loss


def ce(model, x, y):
    """Cross-entropy per image, written out."""
    z = model(x)
    return z.exp().sum(1).log() - z[torch.arange(len(y)), y]


def sign_of_gradient(model, x, y):
    """Image by image."""
    signs = []
    for i in range(len(x)):
        point = x[i:i + 1].clone().requires_grad_(True)
        grad, = torch.autograd.grad(ce(model, point, y[i:i + 1]).sum(), point)
        signs.append(grad.sign())
    return torch.cat(signs)


def into_ball(x_adv, x, eps):
    """Written out: into the eps-ball around x and into [0, 1]."""
    return torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)


def distance(model, a, b):
    """Mean squared L2 distance of the logits, summed image by image."""
    return sum((model(a[i][None]) - model(b[i][None])).pow(2).sum() for i in range(len(a))) / len(a)


def rfgsm_by_formula(model, x, y, args):
    """Eqs. 2 and 3."""
    noisy = x + args.rfgsm_alpha * torch.randn_like(x).sign()
    sign = sign_of_gradient(model, noisy, y)
    return (noisy + (args.eps - args.rfgsm_alpha) * sign).clamp(0, 1)


def truncated_normal(share, eps):
    """Below which z a share of the |N(0, eps/2)| in [0, eps] is, by the normal's quantiles."""
    normal = torch.distributions.Normal(0.0, eps / 2)
    half = torch.tensor(0.5).double()
    inside = normal.cdf(torch.tensor(eps).double()) - half
    return normal.icdf(half + share * inside)


def baseline_by_formula(model, x, y, args):
    """Section 3.2, image by image."""
    eps = args.eps
    if args.method == "nt":
        return ce(model, x, y).mean()
    if args.method == "fgsm-at":
        half = len(x) // 2
        if args.fgsm_eps == "random":
            eps = torch.ones(len(x), 1, 1, 1).double()
            eps[:half, 0, 0, 0] = truncated_normal(torch.rand(half, dtype=x.dtype), args.eps)
        x_fgsm = (x + eps * sign_of_gradient(model, x, y)).clamp(0, 1)
        return ce(model, torch.cat([x_fgsm[:half], x[half:]]), y).mean()
    if args.method == "rfgsm-at":
        return ce(model, rfgsm_by_formula(model, x, y, args), y).mean()
    assert args.method == "pgd-at"
    x_adv = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(args.attack_steps):
        x_adv = into_ball(x_adv + args.step_size * sign_of_gradient(model, x_adv, y), x, eps)
    return ce(model, x_adv, y).mean()


def sat_by_formula(model, x, y, args):
    """Eqs. 14, 15 and 16, term by term, image by image."""
    m = len(x)
    eps = args.eps
    sign = sign_of_gradient(model, x, y)
    x_fgsm = (x + eps * sign).clamp(0, 1)
    first = sum(ce(model, x_fgsm[i:i + 1], y[i:i + 1]).sum() for i in range(m)) / m
    if args.method == "r1":
        last = x[-args.k:]
        x_ifgsm = last
        for _ in range(args.attack_steps):
            sign = sign_of_gradient(model, x_ifgsm, y[-args.k:])
            x_ifgsm = into_ball(x_ifgsm + eps / args.attack_steps * sign, last, eps)
        second = distance(model, x_fgsm[-args.k:], x_ifgsm)
    elif args.method == "r2":
        second = distance(model, x_fgsm, rfgsm_by_formula(model, x, y, args))
    else:
        x_low = (x + args.eps_low * sign).clamp(0, 1)
        second = max(torch.zeros(()), ce(model, x_low, y).mean() - args.tau * first)
    return first + args.lam * second


METHODS = ["fgsm-at", "rfgsm-at", "eat", "pgd-at", "trades", "r1", "r2", "r3"]
BASELINES = [("nt",), ("fgsm-at",), ("fgsm-at", "--fgsm-eps", "random"), ("rfgsm-at",),
             ("pgd-at", "--attack-steps", "4")]
REGULARISED = [("r1",), ("r2",), ("r3",), ("r1", "--k", "3", "--attack-steps", "4"),
               ("r2", "--lam", "25")]


@pytest.mark.parametrize("case", BASELINES + REGULARISED, ids=" ".join)
def test_loss_equals_the_formula(case):
    model, x, y, args, loss = small(*case)
    torch.manual_seed(5)
    ours = loss(x, y)
    torch.manual_seed(5)
    by_formula = baseline_by_formula if case in BASELINES else sat_by_formula
    torch.testing.assert_close(ours["loss"], by_formula(model, x, y, args))
    if case in REGULARISED:
        assert ours["reg"] > 1e-3, "the regulariser is not exercised"
        first = ours["loss_high"] if args.method == "r3" else ours["ce"]
        torch.testing.assert_close(ours["loss"], first + args.lam * ours["reg"])
    if args.method == "r3":
        expected = ours["loss_low"] - args.tau * ours["loss_high"]
        torch.testing.assert_close(ours["reg"], expected)


TRADES = ("trades", "--attack-steps", "4")


@pytest.mark.parametrize("case", BASELINES + REGULARISED + [TRADES], ids=" ".join)
def test_gradient_by_finite_differences(case):
    """d loss / d weights along random directions, in float64: no term has lost its gradient."""
    model, x, y, args, loss = small(*case)

    def terms():
        torch.manual_seed(5)
        return loss(x, y)
    check_slopes(model, terms, rel=1e-4)


@pytest.mark.parametrize("case", BASELINES + REGULARISED + [
    TRADES, ("eat", "--source", "a.pt"), ("r1", "--ce-all"), ("r3", "--r3-noise"),
    ("r1", "--k", "9", "--attack-steps", "3")], ids=" ".join)
def test_cost_is_what_is_counted(case):
    """By hooks: a forward pass of all images is a third, a backward pass two thirds."""
    source = small_net(seed=1)
    model, x, y, args, loss = small(*case, sources=[source])
    forward = []
    backward = []

    def count(network, inputs, logits):
        share = len(logits) / len(x)
        forward.append(share)
        if logits.requires_grad:
            logits.register_hook(lambda grad: backward.append(share))
    for network in (model, source):
        network.register_forward_hook(count)
    terms = loss(x, y)
    cost = sat_rx.step_cost(args.method, len(x), args.attack_steps, args.k)
    assert cost["cost/attack"] == pytest.approx(sum(backward))
    terms["loss"].backward()
    assert cost["cost/passes"] == pytest.approx((sum(forward) + 2 * sum(backward)) / 3)


def test_cost_is_logged(tmp_path, capsys):
    words = ["--dataset", "digits", "--model", "cnn-small", "--limit", 60, "--batch-size", 20,
             "--epochs", 1, "--method", "r1", "--attack-steps", 4, "--ckpt", tmp_path / "r1.pt"]
    run_main(sat_rx.main, "sat_rx.py", *words)
    row, = torch.load(tmp_path / "r1.pt", weights_only=True)["history"]
    assert (row["cost/attack"], row["cost/passes"]) == pytest.approx((1.2, 2.25))
    assert "cost: 2.25 forward-backward passes" in capsys.readouterr().out
    assert sat_rx.step_cost("mine", 20, 4) == {}


def test_degenerate_settings():
    """lambda = 0 leaves CE on FGSM samples; R3's hinge is 0 where the loss grows enough."""
    for method in ("r1", "r2", "r3"):
        model, x, y, args, loss = small(method, "--lam", "0")
        ours = loss(x, y)
        x_fgsm = common.fgsm(model, x, y, args.eps)
        torch.testing.assert_close(ours["loss"], ce(model, x_fgsm, y).mean())
    model, x, y, args, loss = small("r3", "--tau", "1")
    ours = loss(x, y)
    assert ours["reg"] == 0
    assert ours["loss"] == ours["loss_high"] > ours["loss_low"]


@pytest.mark.parametrize("normalize", ["none", "image"])
@pytest.mark.parametrize("method", ["nt", *METHODS])
def test_a_batch_of_one_and_k_above_it(method, normalize):
    """One image: half of the batch is none, and k is at most one."""
    words = ["--k", "4"] if method == "r1" else []
    words += ["--source", "a.pt"] if method == "eat" else []
    words += ["--fgsm-eps", "random"] if method == "fgsm-at" else []
    model, x, y, _, loss = small(method, *words, sources=[small_net(seed=1)])
    model.normalize = normalize
    for _ in range(5):  # EAT draws the model or the source
        assert loss(x[:1], y[:1])["loss"].isfinite()


def test_trades():
    """CE(x) + 6 KL(p(x) || p(x')): against torch's own KL, x' in the ball where it is high."""
    model, x, y, args, loss = small("trades")
    torch.manual_seed(5)
    ours = loss(x, y)
    torch.testing.assert_close(ours["ce"], ce(model, x, y).mean())
    torch.testing.assert_close(ours["loss"], ours["ce"] + 6 * ours["kl"])
    p = torch.distributions.Categorical(logits=model(x))
    kls = []
    for _ in range(50):
        moved = (x + args.eps * torch.randn_like(x).sign()).clamp(0, 1)
        q = torch.distributions.Categorical(logits=model(moved))
        kls.append(torch.distributions.kl_divergence(p, q).mean().item())
    assert ours["kl"].item() > max(kls) > 0


def test_ablations():
    """Section 5.3: --ce-all trains on the regulariser's samples too."""
    model, x, y, args, loss = small("r3", "--lam", "0", "--ce-all")
    sign = sign_of_gradient(model, x, y)
    both = torch.cat([(x + 0.3 * sign).clamp(0, 1), (x + 0.1 * sign).clamp(0, 1)])
    expected = ce(model, both, torch.cat([y, y])).mean()
    torch.testing.assert_close(loss(x, y)["loss"], expected)
    model, x, y, args, loss = small("r1", "--lam", "0", "--ce-all", "--k", "2")
    x_ifgsm = common.ifgsm(model, x[-2:], y[-2:], 0.3, 40)
    both = torch.cat([common.fgsm(model, x, y, 0.3), x_ifgsm])
    expected = ce(model, both, torch.cat([y, y[-2:]])).mean()
    torch.testing.assert_close(loss(x, y)["loss"], expected)
    model, x, y, args, loss = small("r2", "--lam", "0", "--ce-all")
    torch.manual_seed(5)
    ours = loss(x, y)["loss"]
    torch.manual_seed(5)
    x_rfgsm = common.rfgsm(model, x, y, 0.3, 0.01)
    both = torch.cat([common.fgsm(model, x, y, 0.3), x_rfgsm])
    torch.testing.assert_close(ours, ce(model, both, torch.cat([y, y])).mean())


def test_r3_noise():
    """--r3-noise starts from the image after R-FGSM's random step, clipped."""
    _, x, y, _, with_noise = small("r3", "--r3-noise")
    torch.manual_seed(5)
    noised = (x + 0.01 * torch.randn_like(x).sign()).clamp(0, 1)
    torch.manual_seed(5)
    ours = with_noise(x, y)["loss"]
    without = small("r3")[4]
    torch.testing.assert_close(ours, without(noised, y)["loss"])
    assert ours != without(x, y)["loss"]


def test_the_random_eps_is_a_normal_cut_at_eps():
    """Its distribution on [0, eps] is (2 Phi(2 e / eps) - 1) / (2 Phi(2) - 1); seeds repeat it."""
    n = 20_000
    torch.manual_seed(0)
    drawn = sat_rx.draw_eps(torch.zeros(n, 1, 1, 1), 8 / 255)
    torch.manual_seed(0)
    assert drawn.equal(sat_rx.draw_eps(torch.zeros(n, 1, 1, 1), 8 / 255))
    drawn = drawn.double().sort().values
    assert drawn[0] >= 0
    assert drawn[-1] <= torch.tensor(8 / 255)
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    expected = (2 * phi(2 * drawn / (8 / 255)) - 1) / (2 * phi(torch.tensor(2.0).double()) - 1)
    shares = (torch.arange(n) + 0.5) / n
    assert (shares - expected).abs().max() < 2 / n ** 0.5  # Kolmogorov-Smirnov: by chance 1 in 1500


def test_eat_draws_its_source_per_batch():
    """Over many batches the FGSM samples come from the model and from both sources."""
    sources = [small_net(seed=1), small_net(seed=2)]
    model, x, y, _, loss = small("eat", "--source", "a.pt", "--source", "b.pt", sources=sources)
    expected = []
    for crafter in (model, *sources):
        x_fgsm = common.fgsm(crafter, x[:3], y[:3], 0.3)
        expected.append(ce(model, torch.cat([x_fgsm, x[3:]]), y).mean().item())
    torch.manual_seed(0)
    seen = [loss(x, y)["loss"].item() for _ in range(40)]
    nearest = [min(range(3), key=lambda i: abs(expected[i] - value)) for value in seen]
    assert set(nearest) == {0, 1, 2}
    assert all(abs(expected[i] - value) < 1e-9 for i, value in zip(nearest, seen))
    for words in (["--method", "eat"], ["--method", "nt", "--source", "a.pt"]):
        with pytest.raises(common.UsageError, match="--source"):
            flags_of(sat_rx, *words)


@pytest.mark.parametrize("method", METHODS)
def test_attack_mode_reaches_the_attack(method):
    """While the model trains, only the passes of an attack with --attack-mode eval are in eval."""
    class Watched(SmallNet):
        def forward(self, x):
            passes.append((self.training, self[1].training))
            return super().forward(x)
    model = Watched()
    passes = []
    x = torch.rand(6, 1, 6, 6)
    y = torch.randint(0, 5, (6,))
    model(x)
    model.train()
    source = ["--source", "a.pt"] if method == "eat" else []
    for mode in ("eval", "train"):
        _, loss = method_loss(sat_rx, "--method", method, "--dataset", "digits", *source,
                              "--attack-mode", mode, model=model, sources=())
        passes.clear()
        loss(x, y)
        assert passes[-1] == (True, True)
        assert ((False, False) in passes) == (mode == "eval")
        assert model.training and model[1].training


def test_paper_settings():
    """Section 5: lambda, epochs, eps, network and tau; flags win over the table."""
    expected = {("mnist", "r1"): (0.2, 20, 0.3, "lenet+"),
                ("mnist", "r2"): (5, 20, 0.3, "lenet+"),
                ("mnist", "r3"): (1, 20, 0.3, "lenet+"),
                ("cifar10", "r1"): (0.2, 100, 8 / 255, "wrn-28-10"),
                ("cifar10", "r2"): (25, 100, 8 / 255, "wrn-28-10"),
                ("cifar10", "r3"): (1, 100, 8 / 255, "wrn-28-10")}
    for (dataset, method), values in expected.items():
        args = flags_of(sat_rx, "--dataset", dataset, "--method", method)
        assert (args.lam, args.epochs, args.eps, args.model) == values
    assert flags_of(sat_rx, "--dataset", "mnist", "--method", "r3").tau == 0.4
    assert flags_of(sat_rx, "--dataset", "cifar10", "--method", "r3").tau == 0.6
    assert flags_of(sat_rx, "--dataset", "mnist", "--method", "r3").lr == 0.05
    assert flags_of(sat_rx, "--dataset", "mnist", "--method", "r2").lr == 0.01
    args = flags_of(sat_rx, "--dataset", "mnist", "--eps", "8/255", "--lam", "0")
    assert args.eps == 8 / 255
    assert args.lam == 0


@pytest.mark.parametrize("dataset, images", [("digits", 143), ("mnist", 6000), ("cifar10", 5000)])
def test_at_most_a_tenth_is_held_out(dataset, images):
    assert flags_of(sat_rx, "--dataset", dataset).val == images
    assert flags_of(sat_rx, "--dataset", dataset, "--val", "400").val == 400


def test_learning_rate():
    """It falls by 5 after each quarter of the epochs; onecycle rises for 30 %, then falls to 0."""
    args = flags_of(sat_rx, "--dataset", "mnist", "--method", "r2")
    rates = [sat_rx.learning_rate(args, epoch, 0.5) for epoch in range(20)]
    expected = [0.01 * 0.2 ** quarter for quarter in range(4) for _ in range(5)]
    assert rates == pytest.approx(expected)
    args = flags_of(sat_rx, "--dataset", "mnist", "--method", "r2", "--schedule", "onecycle")
    rates = [sat_rx.learning_rate(args, epoch, 0) for epoch in range(20)]
    rising = [0.01 * epoch / 6 for epoch in range(6)]
    falling = [0.01 * (20 - epoch) / 14 for epoch in range(6, 20)]
    assert rates == pytest.approx(rising + falling)
    assert sat_rx.learning_rate(args, 19, 1) == pytest.approx(0)


@pytest.mark.parametrize("schedule", ["paper", "onecycle"])
def test_parts_of_a_schedule_have_its_rates(schedule):
    """Table 9's 5 + 15 and 15 + 5 epochs, and a part amid the schedule: bit for bit."""
    words = ["--dataset", "mnist", "--method", "r2", "--schedule", schedule]
    whole = flags_of(sat_rx, *words)
    expected = [sat_rx.learning_rate(whole, epoch, 0.25) for epoch in range(20)]
    for parts in ((5, 15), (15, 5), (5, 10, 5)):
        rates = []
        for epochs in parts:
            args = flags_of(sat_rx, *words, "--epochs", epochs, "--schedule-start", len(rates),
                            "--schedule-epochs", 20, "--init", "before.pt")
            rates += [sat_rx.learning_rate(args, args.schedule_start + epoch, 0.25)
                      for epoch in range(epochs)]
        assert rates == expected
    last = flags_of(sat_rx, *words, "--epochs", 15, "--schedule-start", 5, "--init", "before.pt")
    assert last.schedule_epochs == 20, "by default the schedule ends with the run"


def test_two_parts_train_as_one_run(tmp_path):
    """Without momentum, which a new run starts at 0, two runs of an epoch are one of two epochs.

    Rates, the order of images, the random eps and what is drawn to watch masking are the same.
    """
    def run(name, *words):
        run_main(sat_rx.main, "sat_rx.py", "--method", "fgsm-at", "--fgsm-eps", "random",
                 "--dataset", "digits", "--limit", 70, "--val", 16, "--model", "cnn-small",
                 "--momentum", 0, "--precision", "float32", "--device", "cpu", "--wandb",
                 "disabled", "--ckpt", tmp_path / name, *words)
        return common.load_checkpoint(tmp_path / name)
    whole = run("whole.pt", "--epochs", 2)
    first = run("first.pt", "--epochs", 1, "--schedule-epochs", 2)
    second = run("second.pt", "--epochs", 1, "--schedule-start", 1, "--init", tmp_path / "first.pt")
    for name, weight in whole["last"]["state_dict"].items():
        assert weight.equal(second["last"]["state_dict"][name])
    for row, expected in zip(first["history"] + second["history"], whole["history"]):
        for name in row.keys() - {"epoch", "seconds", "cost/ms_per_batch"}:
            assert row[name] == expected[name], name
    rates = [row["lr"] for row in whole["history"]]
    assert rates == pytest.approx([0.02, 0.02 / 25])


def test_parts_that_do_not_fit_the_schedule_are_refused():
    for words, match in (
            (["--epochs", 15, "--schedule-start", 6, "--schedule-epochs", 20, "--init", "a.pt"],
             "--schedule-epochs 20 is too short: this run ends with epoch 21"),
            (["--epochs", 5, "--schedule-epochs", 4], "--schedule-epochs 4 is too short"),
            (["--epochs", 15, "--schedule-start", 5], "--schedule-start 5 needs --init")):
        with pytest.raises(common.UsageError, match=match):
            flags_of(sat_rx, *words)


def test_masking_signals_tell_a_masked_network():
    """The gradient points the wrong way at x and right after a step: FGSM fails, PGD does not."""
    class Kinked(torch.nn.Module):
        def forward(self, x):
            z = (x - 0.5).flatten(1).sum(1) * 4
            z = torch.where(z.abs() < 0.5, -z, z - z.sign())
            return torch.stack([z, -z], 1)
    args, _, defaults = parse(sat_rx, "--dataset", "digits")
    x = torch.full((8, 1, 2, 2), 0.5) + 0.001
    y = torch.ones(8, dtype=torch.int64)

    def signals(net):
        return sat_rx.masking_signals(plain(net), x, y, args.eps, args.rfgsm_alpha,
                                      defaults["step_size"], defaults["attack_steps"])
    masked = signals(Kinked())
    sound = signals(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)))
    assert masked["val/fgsm"] == 1
    assert masked["val/pgd"] == 0
    assert masked["masking/loss_gap"] > 0.5
    assert masked["masking/l2_ifgsm"] > 0.5
    assert sound["masking/l2_ifgsm"] < 1e-3
    assert sound["masking/loss_gap"] == pytest.approx(0, abs=1e-3)


def test_masking_is_announced_when_it_sets_in_and_ends(capsys):
    sound = {"val/fgsm": 0.8, "val/pgd": 0.75}
    masked = {"val/fgsm": 0.9, "val/pgd": 0.1}
    history = []
    said = []
    for row in (sound, masked, masked, sound, sound):
        history.append(row)
        sat_rx.announce_masking(history)
        said.append(capsys.readouterr().out)
    assert said[1] == ("gradient masking sets in: 90 % of validation images survive FGSM, "
                       "10 % PGD\n")
    assert said[3] == ("gradient masking is over: 80 % of validation images survive FGSM, "
                       "75 % PGD\n")
    assert not (said[0] or said[2] or said[4])
    sat_rx.announce_masking([masked])
    assert "sets in" in capsys.readouterr().out, "also in the first epoch"


def test_flags_that_do_nothing_are_refused():
    for words in (["--method", "nt", "--lam", "0"], ["--method", "r2", "--tau", "0.3"],
                  ["--method", "r1", "--r3-noise"], ["--method", "rfgsm-at", "--ce-all"],
                  ["--method", "r1", "--step-size", "0.1"], ["--method", "pgd-at", "--k", "2"],
                  ["--method", "r2", "--attack-steps", "3"],
                  ["--method", "r1", "--eps-low", "1/255"],
                  ["--method", "r3", "--source", "a.pt"],
                  ["--method", "eat", "--source", "a.pt", "--fgsm-eps", "random"],
                  ["--method", "nt", "--rfgsm-alpha", "1/255"]):
        with pytest.raises(common.UsageError, match="has no use for"):
            flags_of(sat_rx, *words)
    assert flags_of(sat_rx, "--method", "r2", "--lam", "0", "--ce-all").lam == 0
    with pytest.raises(common.UsageError, match="with --r3-noise alone"):
        flags_of(sat_rx, "--method", "r3", "--rfgsm-alpha", "1/255")
    args = flags_of(sat_rx, "--method", "r3", "--r3-noise", "--rfgsm-alpha", "1/255")
    assert args.rfgsm_alpha == 1 / 255


def test_settings_follow_a_small_radius():
    """R-FGSM's random step, R3's smaller radius and PGD's step keep their share of eps."""
    for dataset, eps in (("cifar10", "2/255"), ("mnist", "0.1"), ("digits", "0.02")):
        usual = flags_of(sat_rx, "--dataset", dataset, "--method", "r3")
        args = flags_of(sat_rx, "--dataset", dataset, "--method", "r3", "--eps", eps)
        assert args.eps < usual.eps
        for name in ("rfgsm_alpha", "eps_low", "step_size"):
            share = getattr(usual, name) / usual.eps
            assert getattr(args, name) / args.eps == pytest.approx(share)
        assert args.rfgsm_alpha <= args.eps / 2
    args = flags_of(sat_rx, "--dataset", "cifar10", "--eps", "2/255", "--method", "pgd-at",
                    "--step-size", "1/255")
    assert args.step_size == 1 / 255


def test_settings_of_imagenet100():
    args = flags_of(sat_rx, "--dataset", "imagenet100", "--method", "r3")
    assert args.model == "resnet18"
    assert (args.epochs, args.lam, args.tau, 255 * args.eps) == (100, 1, 0.6, 8)


def test_radii_out_of_order_are_refused():
    """R-FGSM's second step would descend, R3's penalty would compare a loss with itself."""
    for words in (["--dataset", "cifar10", "--eps", "1/255", "--rfgsm-alpha", "2/255"],
                  ["--dataset", "mnist", "--method", "r3", "--eps", "0.1", "--eps-low", "0.1"]):
        with pytest.raises(common.UsageError, match="below --eps"):
            flags_of(sat_rx, *words)


def test_r2_is_more_robust_than_normal_training(train):
    """On digits, under PGD-40 at eps 0.1: the claim of the README's first command."""
    facts = common.dataset_facts("digits")
    attack, = evaluate.parse_attacks("pgd-40", facts, 0.1)
    test = evaluate.load_test(facts, "data", None, "cpu")
    accuracy = {}
    for method in ("nt", "r2"):
        model, _ = common.load_model(train(method), facts=facts)
        accuracy[method] = evaluate.evaluate(model, test, attack, 360)[:, 0].mean()
        assert common.correct(model, test).float().mean() > 0.9
    assert accuracy["r2"] > accuracy["nt"] + 0.2
