"""What hides a network's gradient: layers around an undefended cnn-small on MNIST.

    python evaluate.py --ckpt weights.pt --model results/verdict_nets.py:quantised --dataset mnist

verdict.sh judges each of them: the verdict of `evaluate.py --sanity` must name its reason.
"""

import torch
from torch import nn

import common


class Layers(nn.Module):
    """cnn-small between two functions, of images and of logits."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.net = common.build_model("cnn-small", common.dataset_facts("mnist")).net
        self.before = before or nn.Identity()
        self.after = after or nn.Identity()

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def quantised():
    """Eight grey levels: the gradient is zero almost everywhere."""
    return Layers(before=lambda x: (8 * x).round() / 8 + 0 * x)


def saturated():
    """Large logits: the cross-entropy and its gradient are zero in float32."""
    return Layers(after=lambda z: 1e5 * z)


def randomised():
    """Noise on the image, drawn anew in each pass."""
    return Layers(before=lambda x: x + 0.1 * torch.randn_like(x))


def batch_dependent():
    """Logits relative to the mean of the batch."""
    return Layers(after=lambda z: z - z.mean(0))


def shattered():
    """A wave of high frequency on the image: the gradient points nowhere."""
    return Layers(before=lambda x: x + 0.02 * torch.sin(500 * x))


def binarised():
    """Black or white, with the gradient of a steep sigmoid."""
    return Layers(before=lambda x: torch.sigmoid(100 * (x - 0.5)))


def winners():
    """Only the tenth of the pixels that are brightest is passed on (k winners take all)."""
    def keep(x):
        flat = x.flatten(1)
        least = flat.topk(flat.shape[1] // 10, dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, 0).view_as(x)
    return Layers(before=keep)
