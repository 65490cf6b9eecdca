"""What the tests share: the path, calls of a script, small networks, runs on real digits."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import sat_rx


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No test talks to W&B unless it says so."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


def run_main(main, script, *words):
    """Call a script's main() in this process as the command line would.

    UsageError passes through.
    """
    before = sys.argv
    sys.argv = [script, *map(str, words)]
    try:
        main()
    finally:
        sys.argv = before


def parse(script, *words):
    """(flags, facts, defaults) that a script's main() would train with.

    UsageError passes through.
    """
    class Parsed(Exception):
        pass

    def stop(losses, argv=None):
        raise Parsed(real(losses, words))
    real = script.parse
    script.parse = stop
    try:
        script.main()
    except Parsed as parsed:
        return parsed.args[0]
    finally:
        script.parse = real


def flags_of(script, *words):
    """The flags alone of `parse`."""
    return parse(script, *words)[0]


def method_loss(script, *words, **variables):
    """(flags, the line of main's dictionary of losses for --method): a function of tensors.

    variables: name -> value of what main() would have by then, such as model.
    """
    dictionary = {}

    def keep(losses, argv=None):
        dictionary.update(losses)
        return real(losses, argv)
    real = script.parse
    script.parse = keep
    try:
        flags, facts, _ = parse(script, *words)
    finally:
        script.parse = real
    variables = dict(variables, args=flags, facts=facts)
    loss = dictionary[flags.method]
    for name, cell in zip(loss.__code__.co_freevars, loss.__closure__):
        cell.cell_contents = variables[name]
    return flags, loss


@pytest.fixture(scope="session")
def train(tmp_path_factory):
    """train(method, *flags) -> path of a sat_rx.py run on digits.

    Each combination is trained once a session.
    """
    done = {}

    def get(method, *flags):
        if (method, *flags) not in done:
            path = tmp_path_factory.mktemp("runs") / f"{method}.pt"
            words = ["--method", method, "--dataset", "digits", "--ckpt", path]
            run_main(sat_rx.main, "sat_rx.py", *words, "--wandb", "disabled", *flags)
            done[method, *flags] = path
        return done[method, *flags]
    return get


def random_mnist(folder):
    """Write folder/mnist.npz of 60 random images in each split."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("train_images", "test_images"):
        arrays[name] = rng.integers(0, 256, (60, 28, 28, 1), dtype=np.uint8)
    for name in ("train_labels", "test_labels"):
        arrays[name] = rng.integers(0, 10, 60)
    np.savez(folder / "mnist.npz", **arrays)


def run_interrupted(main, script, at, *words):
    """Call a script's main() with --resume until it ends.

    Ctrl-C falls at the `at`-th epochs that it starts, counted from 1 over all calls.
    """
    real = common.train_batches
    started = []

    def interrupted(*args):
        started.append(args)
        if len(started) in at:
            raise KeyboardInterrupt
        return real(*args)
    common.train_batches = interrupted
    try:
        for _ in at:
            with pytest.raises(KeyboardInterrupt):
                run_main(main, script, *words, "--resume")
        run_main(main, script, *words, "--resume")
    finally:
        common.train_batches = real


def check_slopes(model, terms, rel):
    """Every named scalar of terms() against finite differences (float64).

    They are taken along a random direction of the weights.
    """
    for name in terms():
        model.zero_grad()
        terms()[name].backward()
        torch.manual_seed(0)
        direction = [torch.randn_like(p) for p in model.parameters()]
        slope = 0
        for p, d in zip(model.parameters(), direction):
            if p.grad is not None:
                slope += (p.grad * d).sum().item()
        values = []
        for h in (1e-6, -2e-6, 1e-6):
            for p, d in zip(model.parameters(), direction):
                p.data += h * d
            values.append(terms()[name].item())
        expected = (values[0] - values[1]) / 2e-6
        assert abs(slope) > 1e-6, name
        assert slope == pytest.approx(expected, rel=rel), name


class Linear(nn.Module):
    """Logits W x + b: every attack has a closed form. W is .layer.weight (classes, pixels)."""

    def __init__(self, shape=(1, 4, 4), classes=3, seed=0, scale=1.0):
        super().__init__()
        torch.manual_seed(seed)
        pixels = shape[0] * shape[1] * shape[2]
        self.layer = nn.Linear(pixels, classes)
        self.layer.weight.data = scale * torch.randn(classes, pixels)

    def forward(self, x):
        return self.layer(x.flatten(1))


class SmallNet(nn.Sequential):
    """A convolutional network with BatchNorm and dropout, whose mode matters."""

    def __init__(self, channels=1, classes=5):
        convolution = nn.Conv2d(channels, 6, 3, padding=1)
        super().__init__(convolution, nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                         nn.LazyLinear(classes))


def plain(net):
    """A network as a Classifier without normalisation."""
    return common.Classifier(net, "none", (0.0,), (1.0,))
