"""The attacks and losses: closed forms, foolbox, and the traps of adversarial-training code."""

import math

import eagerpy
import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import evaluate
from conftest import Linear, SmallNet

DIGITS = common.dataset_facts("digits")
ATTACKS = {
    "fgsm": common.fgsm,
    "rfgsm": lambda m, x, y, eps, **o: common.rfgsm(m, x, y, eps, 0.02, **o),
    "ifgsm": lambda m, x, y, eps, **o: common.ifgsm(m, x, y, eps, 5, **o),
    "pgd": lambda m, x, y, eps, **o: common.pgd(m, x, y, eps, 0.05, 5, **o),
    "pgd-cw": lambda m, x, y, eps, **o: common.pgd(m, x, y, eps, 0.05, 5, loss=common.margin, **o),
    "mi-fgsm": lambda m, x, y, eps, **o: common.mi_fgsm(m, x, y, eps, 5, **o),
}


def batch(n=16, shape=(1, 4, 4), classes=3, low=0.0, high=1.0, seed=1):
    torch.manual_seed(seed)
    return low + (high - low) * torch.rand(n, *shape), torch.randint(0, classes, (n,))


def bent_net(hidden, classes, scale):
    """A network of one hidden layer whose gradient turns, the more the larger `scale`."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, hidden), torch.nn.Tanh(),
                              torch.nn.Linear(hidden, classes))
    for p in net.parameters():
        p.data *= scale
    return net


@pytest.mark.parametrize("name", ["fgsm", "ifgsm", "pgd", "pgd-cw", "mi-fgsm"])
@pytest.mark.parametrize("targeted", [False, True])
def test_closed_form_on_two_classes(name, targeted):
    """On a linear model every pixel moves by eps, along the sign of the weights' difference."""
    model = Linear(classes=2)
    x, y = batch(classes=2, low=0.3, high=0.7)
    x_adv = ATTACKS[name](model, x, y, 0.1, targeted=targeted)
    weight = model.layer.weight.detach()
    away = (weight[1 - y] - weight[y]).view_as(x).sign()
    expected = x - 0.1 * away if targeted else x + 0.1 * away
    torch.testing.assert_close(x_adv, expected)


def test_rfgsm_closed_form():
    """Eqs. 2 and 3: alpha along a random sign, then eps - alpha along the gradient's sign."""
    model = Linear(classes=2)
    x, y = batch(classes=2, low=0.3, high=0.7)
    weight = model.layer.weight.detach()
    toward = (weight[1 - y] - weight[y]).view_as(x).sign()
    step = (common.rfgsm(model, x, y, 0.1, 0.02) - x) * toward
    agree = (step - 0.1).abs() < 1e-6
    against = (step - 0.06).abs() < 1e-6
    assert (agree | against).all()
    assert 0.3 < agree.float().mean() < 0.7


def test_mi_fgsm_against_a_plain_loop():
    """Eqs. 9 to 11, one image at a time, on a network where the gradient turns."""
    model = bent_net(40, 3, scale=3)
    x, y = batch()
    ours = common.mi_fgsm(model, x, y, 0.3, 7, mu=0.9)
    for i in range(len(x)):
        image = x[i:i + 1]
        point = image.clone()
        momentum = 0
        for _ in range(7):
            point.requires_grad_(True)
            grad, = torch.autograd.grad(F.cross_entropy(model(point), y[i:i + 1]), point)
            momentum = 0.9 * momentum + grad / grad.abs().sum()
            point = point.detach() + 0.3 / 7 * momentum.sign()
            point = torch.min(torch.max(point, image - 0.3), image + 0.3).clamp(0, 1)
        torch.testing.assert_close(ours[i:i + 1], point)


@pytest.mark.parametrize("name", ATTACKS)
def test_inside_ball_and_box_and_reaching_both(name):
    """Each image's own eps is kept and reached. At the border of [0, 1] the image is clipped."""
    model = Linear()
    x, y = batch()
    x[:, :, 0] = 0.01
    eps = torch.linspace(0.03, 0.2, len(x))
    delta = ATTACKS[name](model, x, y, eps) - x
    norm = delta.abs().amax((1, 2, 3))
    assert (norm <= eps + 1e-6).all()
    assert (norm >= eps - 1e-6).all()
    assert (x + delta).amin() == 0
    assert (x + delta).amax() <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_model_is_left_as_it_was(name):
    """No .grad, no BatchNorm buffer and no submodule's mode changes, also after an exception."""
    x, y = batch(shape=(1, 6, 6), classes=5)
    model = SmallNet()
    model(x)
    model.train()
    model[1].eval()  # a frozen BatchNorm inside a training network
    modes = [module.training for module in model.modules()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    ATTACKS[name](model, x, y, 0.1)
    with pytest.raises(RuntimeError):
        ATTACKS[name](model, x[:, :, 1:], y, 0.1)
    assert modes == [module.training for module in model.modules()]
    assert all((p.grad == 1).all() for p in model.parameters())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in buffers.items())
    model.train()
    ATTACKS[name](model, x, y, 0.1, mode="train")
    assert not torch.equal(buffers["1.running_mean"], model.state_dict()["1.running_mean"])


@pytest.mark.parametrize("name", ATTACKS)
def test_an_empty_batch_is_not_shown_to_the_model(name):
    """Half of a batch of one is none, and normalisation by image cannot take that."""
    model = common.Classifier(Linear(), "image", (0.0,), (1.0,))
    x, y = batch()
    assert ATTACKS[name](model, x[:0], y[:0], 0.1).shape == (0, 1, 4, 4)


def test_eval_mode_makes_samples_independent():
    """In eval mode an image gets what it gets alone. In train mode it does not."""
    x, y = batch(shape=(1, 6, 6), classes=5)
    model = SmallNet()
    model(x)
    model.train()
    together = common.ifgsm(model, x, y, 0.2, 3)
    alone = common.ifgsm(model, x[3:4], y[3:4], 0.2, 3)
    torch.testing.assert_close(together[3:4], alone)
    trained = common.ifgsm(model, x, y, 0.2, 3, mode="train")
    assert not torch.allclose(trained, together)


def test_random_start():
    """With step 0 PGD returns its start: not x, inside ball and box, and a matter of the seed."""
    model = Linear()
    x, y = batch()
    starts = []
    for seed in (11, 11, 12):
        torch.manual_seed(seed)
        starts.append(common.pgd(model, x, y, 0.3, 0.0, 3))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    delta = starts[0] - x
    assert 0.25 < delta.abs().max() <= 0.3 + 1e-6
    assert starts[0].min() == 0
    assert starts[0].max() == 1


@pytest.mark.parametrize("wrong", [-0.01, 1.01, math.nan])
def test_images_outside_the_unit_box_are_refused(wrong):
    model = Linear()
    x, y = batch()
    x[2, 0, 1, 1] = wrong
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        common.fgsm(model, x, y, 0.1)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_margin(classes):
    """It agrees with numpy. A shift of all logits changes nothing. An attack moves it as told."""
    torch.manual_seed(0)
    logits = torch.randn(8, classes)
    y = torch.randint(0, classes, (8,))
    z = logits.numpy()
    expected = torch.tensor([max(np.delete(z[i], y[i])) - z[i, y[i]] for i in range(8)])
    found = common.margin(logits, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(common.margin(logits - 1000, y), found, atol=1e-3, rtol=0)
    model = Linear(classes=classes)
    x, y = batch(classes=classes)
    before = common.margin(model(x), y)
    higher = common.pgd(model, x, y, 0.1, 0.05, 5, loss=common.margin)
    assert (common.margin(model(higher), y) > before).all()
    lower = common.pgd(model, x, y, 0.1, 0.05, 5, loss=common.margin, targeted=True)
    assert (common.margin(model(lower), y) < before).all()


def test_losses_stay_finite_with_huge_logits():
    """Forward and backward, with logits of +-1e4. KL agrees with torch's own on tame logits."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0]]).requires_grad_(True)
    reference = torch.tensor([[-1e4, 1e4, 3.0], [1e4, 1e4, -1e4]]).requires_grad_(True)
    total = common.kl(logits, reference).sum()
    total = total + common.cross_entropy(logits, torch.tensor([1, 2])).sum()
    total.backward()
    assert total.isfinite()
    assert logits.grad.isfinite().all()
    assert reference.grad.isfinite().all()
    z_p = torch.randn(6, 4)
    z_q = torch.randn(6, 4)
    p = torch.distributions.Categorical(logits=z_p)
    q = torch.distributions.Categorical(logits=z_q)
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(common.kl(z_q, z_p), expected)


def test_kl_as_attack_loss_takes_reference_logits():
    """The TRADES adversary: KL(p(x) || p(x')) rises from a start that is not x."""
    model = Linear()
    x, _ = batch()
    reference = model(x).detach()
    x_adv = common.pgd(model, x, reference, 0.1, 0.03, 5, loss=common.kl)
    start = common.pgd(model, x, reference, 0.1, 0.0, 1, loss=common.kl)
    risen = common.kl(model(x_adv), reference).mean()
    assert risen > 2 * common.kl(model(start), reference).mean() > 0


def test_stopping_early_never_helps_the_defender():
    """labels and restarts: what fewer break, more break, and both really matter here."""
    model = bent_net(60, 4, scale=32)  # rugged: PGD passes over wrong predictions
    x, _ = batch(400)
    y = model(x).argmax(1)

    def broken(attack, *words, **options):
        torch.manual_seed(0)
        x_adv = attack(model, x, y, 0.05, 0.1, 6, *words, **options)
        assert (x_adv - x).abs().max() <= 0.05 + 1e-6
        return model(x_adv).argmax(1) != y
    last = broken(common.pgd)
    any_step = broken(common.pgd, labels=y)
    five = broken(evaluate.restarted, 5, y)
    assert 0.2 < last.float().mean() < 0.8
    assert not (last & ~any_step).any()
    assert not (any_step & ~five).any()
    assert any_step.sum() > last.sum() + 20
    assert five.sum() > any_step.sum() + 10


def test_restarts_are_pgd_from_other_starts():
    """One restart is PGD itself. Without labels the last restart is the result."""
    model = bent_net(60, 4, scale=3)
    x, y = batch(20, classes=4)
    torch.manual_seed(0)
    first = common.pgd(model, x, y, 0.1, 0.02, 3)
    second = common.pgd(model, x, y, 0.1, 0.02, 3)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(evaluate.restarted(model, x, y, 0.1, 0.02, 3, 1, None), first)
    torch.manual_seed(0)
    assert torch.equal(evaluate.restarted(model, x, y, 0.1, 0.02, 3, 2, None), second)


def test_restarts_end_when_all_are_broken():
    """The second restart is not run on an empty batch, which not every network could take."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    model = common.Classifier(net, "image", (0.0,), (1.0,))
    x, _ = batch(classes=2)
    y = model(x).argmax(1)
    x_adv = evaluate.restarted(model, x, y, 1.0, 1.0, 3, 4, y)
    assert (model(x_adv).argmax(1) != y).all()


def test_stopping_early_saves_passes():
    """A broken image is not attacked again: a network that is always wrong costs one pass."""
    model = Linear()
    x, _ = batch()
    sizes = []
    forward = model.forward

    def counted(x):
        sizes.append(len(x))
        return forward(x)
    model.forward = counted
    wrong = (model(x).argmax(1) + 1) % 3
    sizes.clear()
    common.ifgsm(model, x, wrong, 0.1, 50, labels=wrong)
    assert sizes == [len(x)]


@pytest.fixture(scope="module")
def trained(train):
    """A robust network on digits and its test images."""
    words = ["--model", "cnn-small", "--lr", "0.1", "--epochs", "4", "--attack-steps", "3",
             "--step-size", "0.05"]
    model, _ = common.load_model(train("trades", *words))
    return model, evaluate.load_test(DIGITS, "data", 200, "cpu")


def accuracy_of_foolbox(attack, model, test, eps, seed):
    torch.manual_seed(seed)
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1))
    _, _, success = attack(fmodel, common.to_float(test.images), test.labels, epsilons=eps)
    return 1 - success.double().mean().item()


class MarginPGD(foolbox.attacks.LinfPGD):
    """foolbox's PGD on the margin: the highest other logit minus the label's own."""

    def get_loss_fn(self, model, labels):
        y = labels.raw[:, None]

        def loss(inputs):
            logits = model(inputs).raw
            other = logits.scatter(1, y, -math.inf).amax(1)
            return eagerpy.astensor((other - logits.gather(1, y)[:, 0]).sum())
        return loss


FGSM = foolbox.attacks.LinfFastGradientAttack()
IFGSM_10 = foolbox.attacks.LinfBasicIterativeAttack(rel_stepsize=0.1, steps=10, random_start=False)
PGD_20 = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=20)
MARGIN_20 = MarginPGD(rel_stepsize=0.1, steps=20)


@pytest.mark.parametrize("name, oracle, seeds", [
    ("fgsm", FGSM, 1),
    ("ifgsm-10", IFGSM_10, 1),
    ("pgd-20", PGD_20, 4),
    ("pgd-cw-20", MARGIN_20, 4)])
def test_as_strong_as_foolbox(trained, name, oracle, seeds):
    """At equal budget, where between 20 and 80 % survive.

    FGSM is equal. Iterative attacks are at least as strong. Those with a random start are so in
    the mean of four seeds, which differ by 2 points.
    """
    model, test = trained
    tolerance = 0.015 if seeds > 1 else 0.003
    for eps in (0.12, 0.16):
        ours = []
        theirs = []
        for seed in range(seeds):
            attack, = evaluate.parse_attacks(name, DIGITS, eps, step=0.1 * eps, seed=seed)
            ours.append(evaluate.evaluate(model, test, attack, 100)[:, 0].mean())
            theirs.append(accuracy_of_foolbox(oracle, model, test, eps, seed))
        assert 0.2 < np.mean(ours) < 0.8, "choose another eps"
        assert np.mean(ours) <= np.mean(theirs) + tolerance
        if name == "fgsm":
            assert np.mean(ours) == pytest.approx(np.mean(theirs))


def test_a_large_eps_leaves_nothing(trained):
    model, test = trained
    attack, = evaluate.parse_attacks("pgd-40", DIGITS, 0.6)
    flags, largest = evaluate.evaluate(model, test, attack, 120)[:, :2].T
    assert flags.mean() < 0.02
    assert 0.5 < largest.max() <= 0.6 + 1e-6
