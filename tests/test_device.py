"""What speed and GPUs ask of the losses.

A BatchNorm that is fast to differentiate twice, and steps that read nothing back from the device.
"""

import pytest
import torch
from torch import nn

import atlas
import benchmark
import common
import dra_finetune
import iaat
import teacher_saliency
from conftest import check_slopes, plain


def small_batchnorm(shape, dtype=torch.float64):
    """(x that requires a gradient, weight, bias) of random numbers for channels of this shape."""
    torch.manual_seed(0)
    x = (3 + 2 * torch.randn(shape, dtype=dtype)).requires_grad_(True)
    weight = torch.randn(shape[1], dtype=dtype, requires_grad=True)
    bias = torch.randn(shape[1], dtype=dtype, requires_grad=True)
    return x, weight, bias


@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (5, 3), (3, 2, 4)], ids=str)
def test_batchnorm_by_finite_differences(shape):
    """First and second derivatives of the output with respect to images, weight and bias."""
    x, weight, bias = small_batchnorm(shape)

    def ours(x, weight, bias):
        return common.BatchNorm.apply(x, weight, bias, None, None, 0.1, 1e-5)
    assert torch.autograd.gradcheck(ours, (x, weight, bias))
    assert torch.autograd.gradgradcheck(ours, (x, weight, bias))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_twice_differentiable_is_pytorchs(mode):
    """Logits, buffers and first gradients to the bit, second ones to rounding."""
    torch.manual_seed(0)
    model = common.build_model("wrn-10-1", common.dataset_facts("cifar10"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
    model.double().train(mode == "train")
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    x = torch.rand(6, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    y = torch.arange(6)
    found = []
    for forward in (lambda x: model(x), lambda x: common.twice_differentiable(model, x)):
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
        logits = forward(x)
        loss = common.cross_entropy(logits, y).sum()
        first = torch.autograd.grad(loss, [x, *model.parameters()], create_graph=True)
        after = [value.clone() for value in model.buffers()]
        second = torch.autograd.grad(first[0].square().sum(), model.parameters(),
                                     allow_unused=True, materialize_grads=True)
        found.append(([logits, *first, *after], second))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0]))
    scale = max(grad.abs().max() for grad in found[0][1])
    assert scale > 1e-3
    for native, ours in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(ours, native, rtol=1e-9, atol=1e-12 * scale.item())


def smooth_net():
    """A convolutional network with BatchNorm, smooth enough for finite differences, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
                        nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(),
                        nn.Linear(6 * 16, 5), nn.BatchNorm1d(5))
    return plain(net.double())


@pytest.mark.parametrize("name", ["atlas", "jac", "tradesjac", "curriculum"])
def test_losses_with_batchnorm_by_finite_differences(name, monkeypatch):
    """Every term along a random direction of the weights, BatchNorm in train mode and ours."""
    model = smooth_net()
    x = torch.rand(6, 3, 8, 8).double()
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    y = torch.arange(6) % 5
    teacher = smooth_net().eval()
    judges = [teacher_saliency.Discriminator(3, 8, 8).double().eval() for _ in range(2)]
    losses = {
        "atlas": lambda: atlas.atlas_loss(model, x, x_adv, y, 0.5, 3.0),
        "jac": lambda: atlas.jac_loss(model, x, y, 0.5),
        "tradesjac": lambda: atlas.tradesjac_loss(model, x, x_adv, y, 0.5, 3.0),
        "curriculum": lambda: teacher_saliency.curriculum_loss(
            model, teacher, *judges, x, y, 50, 2.0, 7.0, "logit", "image", "negated")[0]}

    def terms():
        torch.manual_seed(3)
        return {key: term for key, term in losses[name]().items() if term.requires_grad}
    calls = []
    ours = common.BatchNormBackward.backward
    monkeypatch.setattr(common.BatchNormBackward, "backward",
                        staticmethod(lambda *grads: calls.append(1) or ours(*grads)))
    check_slopes(model, terms, rel=1e-4)
    assert calls


# --------------------------------------------------------------- every loss, attack and batch

META = torch.device("meta")

# Where a step reads from the device, or its work depends on what it finds there: IAAT attacks the
# images that are classified correctly, and stops where none is left.
READS_BACK = {"iaat-warm", "iaat", "line-search"}


def on_meta(batch=6):
    """(facts, network, a second one in eval mode, images, labels): shapes without values."""
    facts = common.dataset_facts("cifar10")
    networks = [common.build_model("wrn-10-1", facts).to(META) for _ in range(2)]
    x = torch.empty(batch, *facts["shape"], device=META)
    y = torch.zeros(batch, dtype=torch.int64, device=META)
    return facts, networks[0].train(), networks[1].eval().requires_grad_(False), x, y


@pytest.mark.parametrize("name", benchmark.methods(*on_meta()[1:3], on_meta()[0]))
def test_a_step_reads_nothing_back(name):
    """On the meta device a read-back, a branch on a value and a mixture of devices all fail."""
    facts, model, other, x, y = on_meta()
    _, loss = benchmark.methods(model, other, facts)[name]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)

    def step():
        terms = loss(x, y)
        assert all(term.device == META for term in terms.values())
        common.update(optimizer, terms["loss"], len(x))
        assert all(p.grad.device == META for p in model.parameters())
    if name in READS_BACK:
        with pytest.raises((NotImplementedError, RuntimeError)):
            step()
    else:
        step()


ATTACKS = {
    "fgsm": lambda model, x, y: common.fgsm(model, x, y, 0.1),
    "rfgsm": lambda model, x, y: common.rfgsm(model, x, y, 0.1, 0.05),
    "ifgsm": lambda model, x, y: common.ifgsm(model, x, y, 0.1, 2),
    "pgd": lambda model, x, y: common.pgd(model, x, y, torch.rand(len(x), device=META), 0.1, 2),
    "targeted": lambda model, x, y: common.pgd(model, x, y, 0.1, 0.1, 2, targeted=True),
    "margin": lambda model, x, y: common.pgd(model, x, y, 0.1, 0.1, 2, loss=common.margin),
    "mi_fgsm": lambda model, x, y: common.mi_fgsm(model, x, y, 0.1, 2),
    "iaat": lambda model, x, y: iaat.fixed_pgd(model, x, y, 0.1, 0.1, 2, target_classes=10),
    "dra": lambda model, x, y: dra_finetune.dra_attack(model, x, y, 0.1, 2, 0.1, linf=0.2),
    "dra, pgd": lambda model, x, y: dra_finetune.attack(model, x, y, 0.1, "pgd", 2, 0.1),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_reads_nothing_back(name, mode):
    _, model, _, x, y = on_meta()
    x_adv = ATTACKS[name](model.train(mode == "train"), x, y)
    assert x_adv.device == META and x_adv.shape == x.shape


@pytest.mark.parametrize("augment", common.AUGMENTATIONS)
def test_a_batch_reads_nothing_back(augment):
    images = torch.zeros(10, 3, 8, 8, dtype=torch.uint8, device=META)
    positions = torch.zeros(10, dtype=torch.int64, device=META)
    split = common.Split(images, positions, positions)
    batches = list(common.train_batches(split, 4, 0, 0, augment))
    assert [len(x) for x, _, _ in batches] == [4, 4, 2]
    assert {tensor.device for batch in batches for tensor in batch} == {META}


def test_a_read_back_is_noticed():
    """What the tests above rest on."""
    x = torch.zeros(3, device=META)
    for read in (lambda: x.sum().item(), lambda: x[x > 0], lambda: bool(x.any()), lambda: x.cpu(),
                 lambda: x + torch.zeros(3)):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read()


def test_tf32_is_for_gpus():
    with pytest.raises(common.UsageError, match="--tf32"):
        common.set_up("cpu", tf32=True)
