"""Data, backbones, seeds, precision and the Meter."""

import numpy as np
import pytest
import torch

import common
import evaluate
from conftest import plain


def write_npz(path, n=40, shape=(28, 28, 1), **changes):
    rng = np.random.default_rng(0)
    arrays = dict(train_images=rng.integers(0, 256, (n, *shape), dtype=np.uint8), train_labels=rng.integers(0, 10, n),
                  test_images=rng.integers(0, 256, (n, *shape), dtype=np.uint8), test_labels=rng.integers(0, 10, n))
    arrays.update(changes)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


def test_training_and_validation_are_disjoint_and_complete(tmp_path):
    arrays = write_npz(tmp_path / "mnist.npz")
    train, val = common.load_train("mnist", tmp_path, 10, None, "cpu")
    assert sorted(torch.cat([train.index, val.index]).tolist()) == list(range(40))
    for split in (train, val):
        stored = arrays["train_images"][split.index.numpy()].transpose(0, 3, 1, 2)
        assert np.array_equal(split.images.numpy(), stored)
        assert np.array_equal(split.labels.numpy(), arrays["train_labels"][split.index.numpy()])
    few, _ = common.load_train("mnist", tmp_path, 10, 7, "cpu")
    assert len(few.labels) == 7 and set(few.index.tolist()) < set(train.index.tolist())
    torch.manual_seed(123)  # the choice is fixed: it does not depend on --seed or on what was drawn before
    assert torch.equal(common.load_train("mnist", tmp_path, 10, 7, "cpu")[0].index, few.index)


def test_training_does_not_read_the_test_images(tmp_path):
    write_npz(tmp_path / "mnist.npz", test_images=None, test_labels=None)
    assert len(common.load_train("mnist", tmp_path, 0, None, "cpu")[0].labels) == 40
    with pytest.raises(common.UsageError, match="cannot be read"):
        evaluate.load_test("mnist", tmp_path, None, "cpu")


@pytest.mark.parametrize("changes", [
    dict(train_images=np.zeros((40, 28, 28), np.uint8)), dict(train_images=np.zeros((40, 28, 28, 1), np.float32)),
    dict(train_labels=np.zeros(39, int)), dict(train_labels=np.zeros((40, 1), int)), dict(train_labels=np.full(40, 10)),
    dict(train_labels=np.zeros(40)), dict(train_images=None), dict(train_images=np.array([object()] * 40))])
def test_damaged_data_is_named(tmp_path, changes):
    write_npz(tmp_path / "mnist.npz", **changes)
    with pytest.raises(common.UsageError, match="mnist.npz"):
        common.load_train("mnist", tmp_path, 0, None, "cpu")
    (tmp_path / "mnist.npz").write_bytes(b"<html>not found</html>")
    with pytest.raises(common.UsageError, match="mnist.npz"):
        common.load_train("mnist", tmp_path, 0, None, "cpu")


def test_missing_data_without_a_network_is_named(tmp_path, monkeypatch):
    class Unreachable:
        url = "https://data.invalid/cifar.tar.gz"

        def __init__(self, *args, **kwargs):
            raise OSError("no network")
    monkeypatch.setattr(common.import_torchvision().datasets, "CIFAR10", Unreachable)
    with pytest.raises(common.UsageError, match=r"cifar10.npz is missing.*data.invalid.*no network.*train_images"):
        evaluate.load_test("cifar10", tmp_path / "new", None, "cpu")


def test_download_writes_the_npz_once(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            assert download
            self.data = np.full((5, 32, 32, 3), 7 if train else 9, np.uint8)
            self.targets = [0, 1, 2, 3, 4]
    monkeypatch.setattr(common.import_torchvision().datasets, "CIFAR10", Fake)
    assert (evaluate.load_test("cifar10", tmp_path, None, "cpu").images == 9).all()
    monkeypatch.delattr(common.import_torchvision().datasets, "CIFAR10")
    train, _ = common.load_train("cifar10", tmp_path, 0, None, "cpu")
    assert train.images.shape == (5, 3, 32, 32) and (train.images == 7).all()


def test_digits():
    train, val = common.load_train("digits", "nowhere", 237, None, "cpu")
    test = evaluate.load_test("digits", "nowhere", None, "cpu")
    assert (len(train.labels), len(val.labels), len(test.labels)) == (1200, 237, 360)
    assert train.images.shape[1:] == (1, 28, 28) and train.images.max() > 250
    images = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in images for image in test.images) < 5


def test_every_epoch_visits_every_image_once(tmp_path):
    write_npz(tmp_path / "mnist.npz")
    train, _ = common.load_train("mnist", tmp_path, 10, None, "cpu")
    orders = []
    for epoch in (0, 1, 0):
        batches = [(x, y, i) for x, y, i in common.train_batches(train, 8, seed=3, epoch=epoch, augment="")]
        orders.append(torch.cat([i for _, _, i in batches]))
        assert sorted(orders[-1].tolist()) == train.index.tolist()
        lookup = {i: k for k, i in enumerate(train.index.tolist())}
        for x, y, i in batches:
            rows = [lookup[j] for j in i.tolist()]
            assert torch.equal(x, train.images[rows] / 255) and torch.equal(y, train.labels[rows])
    assert torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[1])


def test_crop_and_flip_against_a_plain_loop():
    """Each image equals one of its 81 x 2 crops, and shifts and flips both occur."""
    torch.manual_seed(0)
    x = torch.rand(20, 3, 8, 8)
    out = common.crop_and_flip(x)
    found = []
    for image, result in zip(x, out):
        padded = torch.zeros(3, 16, 16)
        padded[:, 4:12, 4:12] = image
        found += [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)
                  if torch.equal(result, (lambda c: c.flip(2) if flip else c)(padded[:, top:top + 8, left:left + 8]))]
    assert len(found) == 20
    assert len({top for top, _, _ in found}) > 3 and len({left for _, left, _ in found}) > 3
    assert len({flip for _, _, flip in found}) == 2


def test_seeds_do_not_collide():
    """Streams differ by seed, stream, epoch and step, also for seeds above 2^32; the same arguments repeat."""
    keys = [(0, "step", 0, 0), (1, "step", 0, 0), (0, "order", 0, 0), (0, "step", 1, 0), (0, "step", 0, 1),
            (2**32, "step", 0, 0), (2**32 + 1, "step", 0, 0), (2**40, "step", 0, 0)]
    draws = []
    for key in keys + keys:
        common.seed_stream(*key)
        draws.append(torch.rand(4))
    assert all(torch.equal(a, b) for a, b in zip(draws[:8], draws[8:]))
    assert len({tuple(d.tolist()) for d in draws}) == 8


@pytest.mark.parametrize("name, dataset, parameters", [
    ("lenet+", "mnist", 832 + 51_264 + 3_212_288 + 10_250), ("wrn-28-10", "cifar10", 36_479_194),
    ("resnet18", "cifar10", 11_173_962), ("resnet34", "cifar10", 21_282_122), ("vgg11", "cifar10", 9_231_114),
    ("vgg19", "cifar10", 20_040_522), ("densenet-bc-100", "cifar10", 769_162), ("resnet50", "cifar100", 23_705_252),
    ("wrn-16-4", "cifar10", 2_748_890), ("wrn-32-10", "cifar10", None),
    ("eat-a", "mnist", 1_664 + 102_464 + 25_600 * 128 + 128 + 1_290),
    ("eat-b", "mnist", 64 * 65 + 128 * 2305 + 128 * 3201 + 10 * (128 * 144 + 1)),
    ("eat-c", "mnist", 1_280 + 73_792 + 204_928 + 1_290), ("eat-d", "mnist", 235_500 + 3 * 90_300 + 3_010)])
def test_backbones(name, dataset, parameters):
    """Parameter counts as published; WRN-32 has five blocks in each group."""
    model = common.build_model(name, dataset)
    if name in ("resnet18", "vgg11", "densenet-bc-100", "eat-b"):
        assert model(torch.rand(2, *common.DATASETS[dataset]["shape"])).shape == (2, 10)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters
    else:
        assert sum(isinstance(m, common.WideBlock) for m in model.modules()) == 15


@pytest.mark.parametrize("name", ["wrn-27-10", "wrn-4-1", "wrn-28-0", "wrn", "resnet", "resnet20", "vgg16", "lenet", "",
                                  "os.system", "vgg11"])  # VGG-11 halves 28 pixels once too often
def test_unknown_backbones_are_refused(name):
    with pytest.raises(common.UsageError, match="model"):
        common.build_model(name, "mnist")


def test_evaluation_does_not_depend_on_the_batch():
    """A network with BatchNorm in eval mode: the same logits at batch 1 and 20, and by `correct`."""
    torch.manual_seed(0)
    model = common.build_model("wrn-10-1", "cifar10")
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    split = common.Split(images, torch.randint(0, 10, (20,)), torch.arange(20))
    model(common.to_float(split.images))  # BatchNorm statistics that are not the initial ones
    x = common.to_float(split.images)
    model.eval()
    torch.testing.assert_close(torch.cat([model(x[i:i + 1]) for i in range(20)]), model(x), rtol=1e-4, atol=1e-5)
    model.train()
    one, all_of_them = (common.correct(model, split, batch_size=b) for b in (1, 20))
    assert torch.equal(one, all_of_them) and model.training
    assert not torch.allclose(model(x), model.eval()(x))


def test_normalisation_is_inside_the_model():
    x = torch.rand(4, 3, 32, 32)
    net = torch.nn.Flatten()
    facts = common.DATASETS["cifar10"]
    mean, std = (torch.tensor(facts[k]).view(3, 1, 1) for k in ("mean", "std"))
    by_dataset = common.Classifier(net, "dataset", facts["mean"], facts["std"])(x).view_as(x)
    torch.testing.assert_close(by_dataset, (x - mean) / std)
    by_image = common.Classifier(net, "image", facts["mean"], facts["std"])(x)
    torch.testing.assert_close(by_image.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_image.std(1, correction=0), torch.ones(4))
    assert (common.Classifier(net, "image", facts["mean"], facts["std"])(torch.full_like(x, 0.3)).abs() < 1e-3).all()
    torch.testing.assert_close(plain(net)(x).view_as(x), x)


def test_logits_are_float32_under_autocast():
    model = common.build_model("lenet+", "mnist")
    with common.autocast(torch.device("cpu"), "bfloat16"):
        low = model(torch.rand(2, 1, 28, 28))
        assert low.dtype == torch.float32 and common.cross_entropy(low, torch.tensor([1, 2])).dtype == torch.float32
    assert torch.equal(low, low.bfloat16().float()), "autocast was on"
    with common.autocast(torch.device("cpu"), "float32"):
        high = model(torch.rand(2, 1, 28, 28))
    assert not torch.equal(high, high.bfloat16().float())


def test_meter():
    """Means weighted by batch size, over more steps than are read at once; a bad value is named with its step."""
    meter, values = common.Meter(epoch=2), torch.rand(120)
    sizes = [32] * 119 + [5]
    for size, value in zip(sizes, values):
        meter.add(size, {"loss": value, "ce": 2 * value})
    expected = np.average(values.numpy(), weights=sizes)
    assert meter.read() == pytest.approx({"loss": expected, "ce": 2 * expected}, rel=1e-6)
    meter = common.Meter(epoch=2)
    with pytest.raises(common.UsageError, match="ce is nan at epoch 3, step 61"):
        for step in range(120):
            meter.add(8, {"loss": torch.tensor(1.0), "ce": torch.tensor(float("nan") if step >= 60 else 1.0)})


@pytest.mark.parametrize("text, value", [("8/255", 8 / 255), ("0.031", 0.031), ("1", 1.0), ("1e-3", 1e-3)])
def test_eps_is_a_fraction_or_a_number(text, value):
    assert common.unit(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "8", "1/0", "8/", "nan", "inf", "", "256/255"])
def test_eps_outside_the_unit_interval_is_refused(text):
    with pytest.raises(Exception, match="out of range|not a number"):
        common.unit(text)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lenet_plus_is_the_network_with_relu_first(precision):
    """Pooling before ReLU changes neither logits nor any gradient, bit for bit."""
    torch.manual_seed(0)
    model, results = common.build_model("lenet+", "mnist"), []
    layers = list(model.net)
    usual = torch.nn.Sequential(*(layers[i] for i in (0, 2, 1, 3, 5, 4, 6, 7, 8, 9)))
    x = torch.rand(20, 1, 28, 28, requires_grad=True)
    for net in (model.net, usual):
        with common.autocast(torch.device("cpu"), precision):
            logits = net(x)
        grads = torch.autograd.grad(logits.square().sum(), [x, *model.parameters()])
        results.append([logits.detach(), *grads])
    assert isinstance(usual[1], torch.nn.ReLU) and all(torch.equal(a, b) for a, b in zip(*results))
