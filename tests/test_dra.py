"""dra_finetune.py: the attack against a plain loop, the updates one after the other, the dual, both phases."""

import json

import pytest
import torch
import torch.nn.functional as F

import common
import dra_finetune
import evaluate
from conftest import Linear, SmallNet, plain, run_interrupted, run_main

SHORT = ["--dataset", "digits", "--limit", "100", "--batch-size", "25", "--val", "100", "--attack-steps", "3"]


def network(seed=0, classes=4):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 9), torch.nn.Tanh(), torch.nn.Linear(9, classes))
    x = 0.3 + 0.4 * torch.rand(10, 1, 4, 4)
    return plain(net), x, torch.randint(0, classes, (10,))


def plain_dra(model, image, label, eps, steps, p):
    """Algorithm 1 on one image, written out."""
    point = image.clone()
    for _ in range(steps):
        point.requires_grad_(True)
        grad, = torch.autograd.grad(F.cross_entropy(model(point), label), point)
        point = point.detach() + eps / steps * grad / (grad.abs().sum() / grad.numel())
    order = grad.abs().flatten().argsort(descending=True)
    result = image.clone().flatten()
    for rank in range(round(p * image.numel())):
        result[order[rank]] = point.flatten()[order[rank]]
    return result.view_as(image).clamp(0, 1)


@pytest.mark.parametrize("p", [0.0, 0.3, 1 / 3, 1.0])
def test_dra_against_a_plain_loop(p):
    """Sample by sample, with an eps of its own for each; exactly round(p N) values differ."""
    model, x, y = network()
    eps = torch.linspace(0.01, 0.05, len(x))
    ours = common.dra(model, x, y, eps, 5, p)
    for i in range(len(x)):
        torch.testing.assert_close(ours[i:i + 1], plain_dra(model, x[i:i + 1], y[i:i + 1], eps[i].item(), 5, p))
    assert ((ours != x).flatten(1).sum(1) == round(p * 16)).all()


def test_dra_on_a_linear_model():
    """Before the filter the mean change equals eps, along the gradient; the filter keeps its largest values; a gradient
    of zero moves nothing; the result stays in [0, 1]; neither mode nor .grad changes."""
    model, x, y = Linear(classes=2), 0.3 + 0.4 * torch.rand(8, 1, 4, 4), torch.randint(0, 2, (8,))
    delta = (common.dra(model, x, y, 0.02, 7, 1.0) - x).flatten(1)
    torch.testing.assert_close(delta.abs().mean(1), torch.full((8,), 0.02))
    weight = model.layer.weight.detach()
    assert (F.cosine_similarity(delta, weight[1 - y] - weight[y]) > 0.9999).all()
    half = (common.dra(model, x, y, 0.02, 7, 0.5) - x).flatten(1)
    assert (half.abs() > 0).sum(1).eq(8).all() and (half.abs().sum(1) > 0.5 * delta.abs().sum(1)).all()
    model.layer.weight.data *= 0
    assert torch.equal(common.dra(model, x, y, 0.02, 7, 1.0), x)
    net = plain(SmallNet())
    net(torch.rand(4, 1, 6, 6))
    x_adv = common.dra(net.train(), torch.rand(4, 1, 6, 6), torch.zeros(4, dtype=torch.int64), 0.5, 3, 1.0)
    assert x_adv.min() == 0 and x_adv.max() == 1 and all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def arguments(*flags):
    return dra_finetune.parse(["--dataset", "mnist", "--eps", "0.05", "--attack-steps", "3", *flags])


def updates(model, x, y, args, lr, dual=None, precision="float32"):
    """The losses of one batch with a step of SGD after each, as main does."""
    optimizer, done = torch.optim.SGD(model.parameters(), lr), []
    steps = dra_finetune.losses(model, x, y, 0.05, dual, args)
    while True:
        with common.autocast(torch.device("cpu"), precision):
            terms = next(steps, None)
        if terms is None:
            return done
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        done.append({name: float(value) for name, value in terms.items()})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_adversary_attacks_the_updated_network(precision):
    """Section IV.A: first the clean update, then DRA and the second update on the network that it left."""
    model, x, y = network()
    twin, _, _ = network()
    clean, adversarial = updates(model, x, y, arguments(), 3.0, precision=precision)
    loss = F.cross_entropy(twin(x), y)
    tolerance = dict(rel=1e-5 if precision == "float32" else 0.02)
    assert clean["loss"] == pytest.approx(loss.item(), **tolerance)
    loss.backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= 3.0 * p.grad
    stale = F.cross_entropy(network()[0](common.dra(network()[0], x, y, 0.05, 3, 2 / 3)), y).item()
    fresh = F.cross_entropy(twin(common.dra(twin, x, y, 0.05, 3, 2 / 3)), y).item()
    assert abs(stale - fresh) > 0.05 and adversarial["loss"] == pytest.approx(fresh, **tolerance)


def test_from_scratch_strategies():
    """Madry's is cross-entropy on the adversary alone; TRADES adds KL(p(x) || p(x')); both with either adversary."""
    for adversary in ("dra", "pgd"):
        model, x, y = network()
        args = arguments("--strategy", "madry", "--adversary", adversary)
        torch.manual_seed(1)
        terms, = dra_finetune.losses(model, x, y, 0.05, None, args)
        torch.manual_seed(1)
        x_adv = dra_finetune.adversary(model, x, y, 0.05, args)
        assert terms["loss"].item() == pytest.approx(F.cross_entropy(model(x_adv), y).item())
        linf = (x_adv - x).abs().max().item()
        assert linf == pytest.approx(0.05) if adversary == "pgd" else linf > 0.06
        args = arguments("--strategy", "trades", "--lam", "3", "--adversary", adversary)
        terms, = dra_finetune.losses(model, x, y, 0.05, None, args)
        ce, kl = terms["ce_clean"].item(), terms["kl"].item()
        torch.manual_seed(2)
        x_adv = dra_finetune.adversary(model, x, model(x).detach(), 0.05, args, common.kl, common.gaussian_start)
        moved = (x_adv - x).abs().flatten(1)
        assert moved.max() <= 0.05 + 1e-6 if adversary == "pgd" else (moved > 0).sum(1).max() <= round(2 / 3 * 16)
        assert kl > 1e-4 and terms["loss"].item() == pytest.approx(ce + 3 * kl)


def test_the_dual():
    """Eqs. 8 and 9: lambda rises while the clean loss exceeds the first phase's, falls otherwise, never below 0."""
    model, x, y = network()
    args, dual = arguments("--constraint", "dual", "--dual-lr", "0.5"), dict(lam=torch.tensor(1.0), std=0.2)
    terms, = updates(model, x, y, args, 0.0, dual)
    excess = terms["ce_clean"] - 0.2
    assert excess > 0 and dual["lam"].item() == pytest.approx(1 + 0.5 * excess)
    assert terms["loss"] == pytest.approx(terms["ce_adv"] + excess)
    dual["std"] = 50.0
    updates(model, x, y, args, 0.0, dual)
    assert dual["lam"] == 0
    assert {"ce_adv", "lam"} <= next(dra_finetune.losses(model, x, y, 0.0, dual, args)).keys()  # at eps 0, too


def test_the_first_phases_loss():
    """Over the batches given, BatchNorm by their own statistics, which leave the network's as they were."""
    torch.manual_seed(0)
    model = plain(torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 3))).eval()
    batches = [(torch.rand(n, 1, 4, 4), torch.randint(0, 3, (n,)), None) for n in (8, 4)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    value = dra_finetune.clean_loss(model, batches)
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items()) and not model.training
    model.train()
    expected = sum(F.cross_entropy(model(x), y).item() * len(y) for x, y, _ in batches) / 12
    assert value == pytest.approx(expected)


def test_schedule_and_settings():
    """Section V.A: eps 2 to 0.5 of 255 over 50 epochs, then ten clean ones; MNIST constant; normalised units."""
    args = dra_finetune.parse([])
    eps = [255 * dra_finetune.eps_at(epoch, args) for epoch in range(60)]
    assert (eps[0], eps[49]) == (pytest.approx(2), pytest.approx(0.5)) and eps[50:] == [0] * 10
    steps = [a - b for a, b in zip(eps, eps[1:50])]
    assert max(steps) == pytest.approx(min(steps))
    assert (args.model, args.attack_steps, args.batch_size, args.p) == ("resnet50", 5, 128, pytest.approx(1 / 3))
    scaled = dra_finetune.parse(["--normalized-eps"])
    assert 255 * dra_finetune.eps_at(0, scaled) == pytest.approx(2 * (0.2470 + 0.2435 + 0.2616) / 3)
    mnist = dra_finetune.parse(["--dataset", "mnist"])
    assert {dra_finetune.eps_at(epoch, mnist) for epoch in range(50)} == {0.1}
    aimed = [evaluate.trained_eps(dict(dataset="cifar10", args=vars(scaled)), asked)[0] for asked in (False, True)]
    assert [255 * eps for eps in aimed] == [pytest.approx(5.1 * common.pixel_scale("cifar10")), pytest.approx(5.1)]
    assert 255 * evaluate.trained_eps(dict(dataset="cifar10", args=vars(args)), False)[0] == pytest.approx(5.1)
    large = dra_finetune.parse(["--dataset", "mnist", "--eps", "0.3"])
    assert {dra_finetune.eps_at(epoch, large) for epoch in range(50)} == {0.3}
    assert dra_finetune.parse(["--epochs", "6"]).clean_epochs == 1
    pgd = dra_finetune.parse(["--adversary", "pgd", "--eps", "2.55/255", "--eps-end", "2.55/255"])
    assert 255 * dra_finetune.eps_at(0, pgd) == pytest.approx(2.55) == pytest.approx(255 * dra_finetune.eps_at(49, pgd))
    madry = dra_finetune.parse(["--strategy", "madry"])
    assert (madry.epochs, madry.lr, madry.clean_epochs, madry.adversary) == (100, 0.1, 0, "pgd")
    assert dra_finetune.eps_at(0, madry) == dra_finetune.eps_at(99, madry) == 8 / 255  # table I
    trades = dra_finetune.parse(["--dataset", "mnist", "--strategy", "trades", "--eps", "0.2"])
    assert dra_finetune.eps_at(0, trades) == trades.pgd_eps == 0.2
    tuned = dra_finetune.parse(["--adversary", "pgd"])
    assert [255 * dra_finetune.eps_at(e, tuned) for e in (0, 49)] == [pytest.approx(5.1), pytest.approx(5.1 / 4)]
    assert dra_finetune.parse(["--constraint", "dual"]).clean_epochs == 0
    assert dra_finetune.eps_at(3, dra_finetune.parse(["--strategy", "vanilla"])) == 0
    for flags in (["--constraint", "dual", "--strategy", "madry"], ["--clean-epochs", "60"], ["--p", "2"],
                  ["--adversary", "pgd", "--p", "0.5"], ["--strategy", "trades", "--p", "0.5"], ["--lam", "1"],
                  ["--dual-lr", "0.1"], ["--strategy", "vanilla", "--pretrain-epochs", "3"],
                  ["--init", "v.pt", "--pretrain-lr", "0.1"], ["--eps", "1/255", "--eps-end", "2/255"],
                  ["--constraint", "dual", "--clean-epochs", "1"]):
        with pytest.raises(common.UsageError):
            dra_finetune.parse(flags)


def test_crops_without_flips():
    """MNIST's augmentation moves the digits and never mirrors them."""
    torch.manual_seed(0)
    x = torch.zeros(400, 1, 8, 8)
    x[:, :, 4, 4:6] = torch.tensor([0.2, 0.9])  # dark before bright
    moved, flipped = common.crop_and_flip(x, "crop"), common.crop_and_flip(x)
    mirrored = lambda images: ((images[..., :-1] == 0.9) & (images[..., 1:] == 0.2)).flatten(1).any(1)
    assert not mirrored(moved).any() and 0.2 < mirrored(flipped).float().mean() < 0.6
    assert not torch.equal(moved, x) and (moved.sum((1, 2, 3)) > 1).float().mean() > 0.4


@pytest.mark.parametrize("flags", [[], ["--constraint", "dual"], ["--adversary", "pgd"], ["--strategy", "trades"],
                                   ["--strategy", "madry"], ["--strategy", "vanilla"]], ids=" ".join)
def test_launch_resume_evaluate(tmp_path, flags, capsys):
    """Both phases in one go equal two interruptions, one in each phase; the first phase's network is a run of its own,
    from which --init starts the second."""
    vanilla, two = "vanilla" in flags, "--strategy" not in flags
    words = [*(SHORT[:-2] if vanilla else SHORT), *flags, "--epochs", "3"]
    words += (two and "dual" not in flags) * ["--clean-epochs", "0"]
    both = [*words, *two * ["--pretrain-epochs", "2"]]
    run_main(dra_finetune.main, "dra_finetune.py", *both, "--ckpt", tmp_path / "whole.pt")
    at = (2, 5) if two else (2,)
    run_interrupted(dra_finetune.main, "dra_finetune.py", at, *both, "--ckpt", tmp_path / "cut.pt")
    whole, cut = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "cut.pt"))
    assert all(torch.equal(v, cut["last"]["state_dict"][k]) for k, v in whole["last"]["state_dict"].items())
    assert whole["method_state"]["lam"] == cut["method_state"]["lam"]
    assert (tmp_path / "whole.vanilla.pt").exists() == two
    if two:
        capsys.readouterr()
        run_main(dra_finetune.main, "dra_finetune.py", *words, "--ckpt", tmp_path / "third.pt", "--init",
                 tmp_path / "whole.vanilla.pt")
        third = torch.load(tmp_path / "third.pt", weights_only=True)
        assert all(torch.equal(v, third["last"]["state_dict"][k]) for k, v in whole["last"]["state_dict"].items())
        assert "% before," in capsys.readouterr().out and not (tmp_path / "third.vanilla.pt").exists()
        (tmp_path / "whole.vanilla.pt").unlink()  # third.resume.pt alone suffices to go on
        run_main(dra_finetune.main, "dra_finetune.py", *words, "--ckpt", tmp_path / "third.pt", "--init",
                 tmp_path / "whole.vanilla.pt", "--resume")
    with pytest.raises(common.UsageError, match="--overwrite replaces it"):
        run_main(dra_finetune.main, "dra_finetune.py", *words, "--ckpt", tmp_path / "whole.pt")
    run_main(evaluate.main, "evaluate.py", "--ckpt", tmp_path / "cut.pt", "--limit", 50, "--attacks",
             "clean,pgd-3,dra-3:0.02", "--p", "0.5", "--normalized-eps")
    outcomes = {o["attack"]: o for o in json.loads((tmp_path / "cut.eval.json").read_text())}
    assert list(outcomes) == ["clean", "pgd-3 normalised", "dra-3:0.02 normalised"]
    assert outcomes["pgd-3 normalised"]["eps"] == pytest.approx(0.1)  # that of training, which was in pixels
    assert outcomes["dra-3:0.02 normalised"]["eps"] == pytest.approx(0.02 * common.pixel_scale("digits"))
    assert outcomes["dra-3:0.02 normalised"]["p"] == 0.5
