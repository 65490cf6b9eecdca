"""What speed asks of the losses: a BatchNorm that is fast to differentiate twice."""

import pytest
import torch
from torch import nn

import atlas
import common
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
