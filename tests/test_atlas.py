"""atlas.py: the Jacobian's estimate, eq. 12 term by term, degenerate settings, the guided schedule, launches."""

import json

import pytest
import torch

import atlas
import common
import evaluate
from conftest import SmallNet, check_slopes, plain, run_interrupted, run_main

SHORT = ["--dataset", "digits", "--limit", "100", "--batch-size", "25", "--val-steps", "2", "--ramp", "1"]


def small(*flags, seed=0):
    """(float64 network, images, labels, flags), smooth enough for finite differences."""
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 12), torch.nn.Tanh(), torch.nn.Linear(12, 4))
    args = atlas.parse(["--dataset", "mnist", "--eps", "0.1", *flags])
    return plain(net.double()), torch.rand(6, 1, 4, 4).double(), torch.randint(0, 4, (6,)), args


def exact_jacobian_norm(model, x):
    """Squared Frobenius norm per sample by torch.func.jacrev."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda image: model(image[None])[0]))(x)
    return jacobian.flatten(1).square().sum(1)


def test_the_estimate_is_the_exact_norm_in_the_mean():
    model, x, _, _ = small()
    exact = exact_jacobian_norm(model, x)
    x.requires_grad_(True)
    torch.manual_seed(1)
    draws = torch.stack([atlas.jacobian_norm(model(x), x).detach() for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - exact).abs() < 4 * error).all() and (error < 0.05 * exact).all()
    many = atlas.jacobian_norm(model(x), x, projections=500).detach()
    assert ((many - exact).abs() < 5 * draws.std(0) / 500**0.5).all()


CASES = [("--alpha", "0.5", "--beta", "3"), ("--alpha", "0"), ("--beta", "0"), ("--loss", "adv"),
         ("--loss", "trades", "--beta", "2"), ("--loss", "jac", "--alpha", "0.5"),
         ("--loss", "tradesjac", "--alpha", "0.5", "--beta", "3"), ("--steps", "4", "--projections", "3")]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize("growth", [1.0, 0.4])
def test_loss_equals_the_formula(case, growth):
    """Eq. 12 and the losses it is compared with, with the adversary and the projections of the same seed."""
    model, x, y, args = small(*case)
    torch.manual_seed(3)
    ours = atlas.atlas_loss(model, x.clone(), y, growth, args)
    torch.manual_seed(3)
    x_adv = atlas.adversary(model, x, y, growth * args.eps, args)
    center, other = (x_adv, x) if args.loss in ("atlas", "adv") else (x, x_adv)
    z, w = model(center), model(other)
    expected = (z.exp().sum(1).log() - z[torch.arange(6), y]).mean()
    if args.alpha:
        norms = 0
        for _ in range(args.projections):
            v = torch.randn(6, 4, dtype=torch.float64)
            v = v / v.norm(dim=1, keepdim=True)
            for i in range(6):
                jacobian = torch.func.jacrev(lambda image: model(image[None])[0])(center[i]).flatten(1)
                norms = norms + 4 * (v[i] @ jacobian).square().sum() / 6 / args.projections
        expected = expected + growth * args.alpha * norms
    if args.beta:
        p = torch.distributions.Categorical(logits=z), torch.distributions.Categorical(logits=w)
        expected = expected + growth * args.beta * torch.distributions.kl_divergence(*p).mean()
    torch.testing.assert_close(ours["loss"], expected)
    assert set(ours) == {"loss", "ce"} | ({"jacobian"} if args.alpha else set()) | ({"kl"} if args.beta else set())


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_gradient_by_finite_differences(case):
    """Every term, in float64, along a random direction of the weights: through the Jacobian and both sides of KL."""
    model, x, y, args = small(*case)

    def terms():
        torch.manual_seed(3)
        return atlas.atlas_loss(model, x.clone(), y, 1.0, args)
    check_slopes(model, terms, rel=1e-4)


def test_adversary():
    """One step: 1.25 eps from a start in the ball; several: no step above eps; JAC, and eps 0: the image itself."""
    model, x, y, args = small()
    x = 0.3 + 0.4 * x
    x_adv = atlas.adversary(model, x, y, 0.1, args)
    delta = (x_adv - x).abs()
    inside = (delta < 0.1 - 1e-6).double().mean()  # a start s ends at s + 1.25 eps: inside for s < -0.25 eps, 3 in 8
    assert delta.max() <= 0.1 + 1e-6 and 0.2 < inside < 0.55
    assert common.cross_entropy(model(x_adv), y).mean() > common.cross_entropy(model(x), y).mean()
    longer = atlas.adversary(model, x, y, 0.1, small("--fgsm-step", "2")[3])
    assert ((longer - x).abs() > 0.1 - 1e-6).all()  # every start reaches the border
    several = small("--steps", "7", "--step-size", "0.03")[3]
    assert (atlas.adversary(model, x, y, 0.02, several) - x).abs().max() == pytest.approx(0.02)
    assert torch.equal(atlas.adversary(model, x, y, 0.1, small("--loss", "jac")[3]), x)
    assert torch.equal(atlas.adversary(model, x, y, 0.0, args), x)


def test_the_start_on_black_pixels():
    """Clipped, a start s >= 0 takes a black pixel to 0 or eps; open, what rises from s < -eps / 4 stays below eps."""
    model, _, y, _ = small()
    x, y = torch.zeros(60, 1, 4, 4).double(), y.repeat(10)
    for flag, share in (("--clip-start", 0), ("--no-clip-start", 3 / 8)):
        x_adv = atlas.adversary(model, x, y, 0.1, small(flag)[3])
        raised = x_adv[x_adv > 1e-6]
        assert x_adv.min() >= 0 and raised.max() == pytest.approx(0.1) and len(raised) > 200
        assert (raised < 0.1 - 1e-6).double().mean() == pytest.approx(share, abs=0.06)
    assert atlas.parse(["--dataset", "mnist"]).clip_start is False and atlas.parse([]).clip_start is True


def test_without_weights_it_is_adv_bit_for_bit():
    results = []
    for flags in (["--loss", "adv"], ["--alpha", "0", "--beta", "0"]):
        model, x, y, args = small(*flags)
        torch.manual_seed(4)
        loss = atlas.atlas_loss(model, x, y, 0.7, args)["loss"]
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("flags, forwards, backwards, second", [
    (["--loss", "adv"], 2, 2, 0), (["--alpha", "0"], 3, 3, 0), (["--beta", "0"], 2, 3, 1), ([], 3, 4, 1),
    (["--alpha", "0", "--beta", "0", "--steps", "5"], 6, 6, 0), (["--loss", "jac"], 1, 2, 1),
    (["--loss", "trades"], 4, 3, 0)])
def test_a_term_of_weight_zero_costs_nothing(flags, forwards, backwards, second, monkeypatch):
    """Passes are counted: forwards, flows through each forward's logits, and backwards that build a graph."""
    model, x, y, args = small(*flags)
    count = dict(forward=0, backward=0, second=0)
    forward, grad = model.forward, torch.autograd.grad

    def counted_forward(x):
        logits = forward(x)
        count["forward"] += 1
        if logits.requires_grad:
            logits.register_hook(lambda g: count.__setitem__("backward", count["backward"] + 1))
        return logits

    def counted_grad(*a, create_graph=False, **k):
        count["second"] += create_graph
        return grad(*a, create_graph=create_graph, **k)
    model.forward = counted_forward
    monkeypatch.setattr(torch.autograd, "grad", counted_grad)
    atlas.atlas_loss(model, x, y, 1.0, args)["loss"].backward()
    assert (count["forward"], count["backward"], count["second"]) == (forwards, backwards, second)


def test_bfloat16_keeps_the_jacobian():
    """Under autocast the term and its gradient are there, and close to float32's."""
    torch.manual_seed(0)
    model = common.build_model("lenet+", "mnist")
    args = atlas.parse(["--dataset", "mnist", "--loss", "jac", "--alpha", "1"])  # at x: the same in both precisions
    x, y, grads = torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,)), {}
    for precision in ("float32", "bfloat16"):
        model.zero_grad()
        with common.autocast(torch.device("cpu"), precision):
            torch.manual_seed(1)
            terms = atlas.atlas_loss(model, x.clone(), y, 1.0, args)
        terms["jacobian"].backward()
        grads[precision] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    cosine = torch.nn.functional.cosine_similarity(grads["float32"], grads["bfloat16"], dim=0)
    ratio = grads["bfloat16"].norm() / grads["float32"].norm()
    assert cosine > 0.95 and 0.9 < ratio < 1.1


@pytest.mark.parametrize("loss", ["atlas", "trades", "tradesjac"])
def test_bfloat16_trains_every_weight(loss):
    """Autocast keeps copies of the weights: one made for the attack's target must not cut the loss from the weights."""
    torch.manual_seed(0)
    model = common.build_model("wrn-10-1", "cifar10")
    args = atlas.parse(["--loss", loss])
    with common.autocast(torch.device("cpu"), "bfloat16"):
        terms = atlas.atlas_loss(model.train(), torch.rand(8, 3, 32, 32), torch.randint(0, 10, (8,)), 1.0, args)
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_batchnorm_is_moved_by_training_forwards_alone():
    torch.manual_seed(0)
    model = plain(SmallNet())
    x, y = torch.rand(8, 1, 6, 6), torch.randint(0, 5, (8,))
    model(x)
    before = model.net[1].num_batches_tracked.item()
    args = atlas.parse(["--dataset", "mnist", "--steps", "3", "--eps", "0.1"])
    atlas.atlas_loss(model.train(), x, y, 1.0, args)["loss"].backward()
    assert model.net[1].num_batches_tracked.item() == before + 2  # x' and x


def test_the_schedule_is_reduce_on_plateau():
    """Against torch's scheduler on random accuracies, counted from the end of the ramp, where the best is that of all
    epochs so far; ten without a gain end it."""
    for seed in range(20):
        torch.manual_seed(seed)
        values = (0.5 + 0.4 * torch.rand(40)).tolist()
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.2, patience=1, threshold=0,
                                                            eps=0)
        history, best, since = [], -1, 0
        for epoch, value in enumerate(values, 1):
            history.append({"epoch": epoch, "val/robust": value})
            lr, finished = atlas.guide(history, 0.1, ramp=5, plateau=2, patience=10)
            best, since = max(best, value), 0 if value > best or epoch <= 5 else since + 1
            if epoch == 5:
                theirs.best = best
            if epoch > 5:
                theirs.step(value)
            assert lr == pytest.approx(optimizer.param_groups[0]["lr"]) and finished == (since >= 10)


def test_overfitting_is_announced(capsys):
    """Once, when robust accuracy is 10 points below its best and the Jacobian at x' has doubled, however slowly."""
    def say(*rows):
        atlas.announce_overfitting([{"val/robust": robust, "val/jacobian_adv": norm} for robust, norm in rows])
        return capsys.readouterr().out
    assert say((0.6, 5.0)) == say((0.6, 5.0), (0.55, 30.0)) == say((0.6, 5.0), (0.3, 9.0)) == ""
    assert "from 0.600 to 0.300, ||J(x')||^2 risen from 5 to 30" in say((0.6, 5.0), (0.3, 30.0))
    assert "from 0.600 to 0.480" in say((0.6, 5.0), (0.56, 8.0), (0.52, 9.0), (0.48, 11.0))
    assert say((0.6, 5.0), (0.3, 30.0), (0.2, 40.0)) == ""


def test_validation_sees_the_attack_of_training():
    """The Jacobian and the weak attack's accuracy are taken at x'; BatchNorm's statistics stay as they were."""
    model, x, y, args = small("--attack-mode", "train")
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1).double(), model).train()
    split = common.Split((255 * x).round().to(torch.uint8), y, torch.arange(len(x)))
    before = model[0].running_mean.clone()
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(atlas, "jacobian_norm", lambda logits, x, **k: seen.append((logits, x)) or logits.sum(1))
        row = atlas.validate(model.float(), split, args, torch.device("cpu"), "float32")
    (logits, x_adv), clean = (t.detach() for t in seen[0]), split.images.float() / 255
    assert (x_adv - clean).abs().max() == pytest.approx(args.eps, abs=1e-6)
    assert row["val/weak"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert row["val/jacobian_adv"] == pytest.approx(logits.sum(1).mean().item())
    assert torch.equal(model[0].running_mean.double(), before) and model.training


def test_paper_settings():
    """Appendix B: alpha and beta for one and several steps; the README's command is the paper's one-step ATLAS."""
    for dataset, steps, loss, expected in [
            ("cifar10", 1, "atlas", (2e-4, 5)), ("cifar10", 10, "atlas", (1e-4, 5)), ("mnist", 1, "jac", (0.5, 0)),
            ("mnist", 1, "atlas", (1e-5, 0.3)), ("mnist", 20, "atlas", (5e-6, 0.2)), ("cifar10", 1, "trades", (0, 2)),
            ("cifar10", 10, "trades", (0, 4)), ("cifar10", 1, "tradesjac", (2e-4, 0.5)),
            ("cifar100", 10, "atlas", (1e-4, 10))]:
        args = atlas.parse(["--dataset", dataset, "--loss", loss] + (loss != "jac") * ["--steps", str(steps)])
        assert (args.alpha, args.beta) == expected
    ours, theirs = atlas.parse(["--steps", "1", "--alpha", "2e-4", "--beta", "5"]), atlas.parse([])
    assert vars(ours) == vars(theirs)
    assert atlas.parse(["--loss", "jac"]).ramp == 0 and ours.ramp == 15
    assert (ours.dataset, ours.model, ours.lr, ours.batch_size, ours.val) == ("cifar10", "wrn-28-8", 0.1, 64, 5000)
    for flags in (["--loss", "adv", "--alpha", "1"], ["--loss", "trades", "--alpha", "1"],
                  ["--loss", "jac", "--beta", "1"], ["--val", "0"], ["--loss", "jac", "--steps", "2"],
                  ["--loss", "adv", "--projections", "2"], ["--loss", "jac", "--ramp", "1"],
                  ["--steps", "2", "--no-clip-start"], ["--steps", "2", "--fgsm-step", "2"]):
        with pytest.raises(common.UsageError):
            atlas.parse(flags)


@pytest.mark.parametrize("loss", ["atlas", "adv", "trades", "jac", "tradesjac"])
def test_launch_resume_evaluate(tmp_path, loss):
    """Two epochs in one go equal one, an interruption, and another; evaluate.py reads what is written."""
    words = [*(SHORT[:-2] if loss == "jac" else SHORT), "--loss", loss, "--epochs", "2"]
    run_main(atlas.main, "atlas.py", *words, "--ckpt", tmp_path / "whole.pt")
    run_interrupted(atlas.main, "atlas.py", (2,), *words, "--ckpt", tmp_path / "cut.pt")
    whole, cut = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "cut.pt"))
    assert all(torch.equal(v, cut["last"]["state_dict"][k]) for k, v in whole["last"]["state_dict"].items())
    logged = {"val/clean", "val/robust", "val/weak", "val/jacobian_adv", "cost/passes", "eps"}
    assert logged <= whole["history"][0].keys()
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "cut.pt", "--attacks", "clean,pgd-3", "--limit", 50)
    assert [o["attack"] for o in json.loads((tmp_path / "cut.eval.json").read_text())] == ["clean", "pgd-3"]


def test_no_gain_ends_training(tmp_path, monkeypatch):
    """With patience 1 and an accuracy that never rises, the first epoch after the ramp is the last."""
    monkeypatch.setattr(atlas, "validate", lambda *a: {"val/clean": 0.5, "val/robust": 0.5, "val/jacobian_adv": 1.0})
    words = [*SHORT, "--loss", "adv", "--epochs", "9", "--patience", "1", "--ckpt", tmp_path / "run.pt"]
    run_main(atlas.main, "atlas.py", *words)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["last"]["epoch"] == 2
