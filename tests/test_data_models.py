"""Data, backbones, seeds, precision, the learning rate's cycle and the Meter."""

import numpy as np
import pytest
import torch

import common
import evaluate
import sat_rx
from conftest import flags_of, plain, run_main

DIGITS = common.dataset_facts("digits")
MNIST = common.dataset_facts("mnist")
CIFAR10 = common.dataset_facts("cifar10")


def write_npz(path, n=40, shape=(28, 28, 1), classes=10, **changes):
    """Write n random images for each split; `changes` replace arrays, None leaves one out."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, classes, n)
    arrays["train_labels"][:classes] = range(classes)  # every class occurs
    arrays.update(changes)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return arrays


# ------------------------------------------------------------------------------------------ data

def test_training_and_validation_are_disjoint_and_complete(tmp_path):
    arrays = write_npz(tmp_path / "mnist.npz")
    train, val = common.load_train(MNIST, tmp_path, 10, None, "cpu")
    assert sorted(torch.cat([train.index, val.index]).tolist()) == list(range(40))
    for split in (train, val):
        stored = arrays["train_images"][split.index.numpy()].transpose(0, 3, 1, 2)
        assert np.array_equal(split.images.numpy(), stored)
        labels = arrays["train_labels"][split.index.numpy()]
        assert np.array_equal(split.labels.numpy(), labels)
    few, _ = common.load_train(MNIST, tmp_path, 10, 7, "cpu")
    assert len(few.labels) == 7
    assert set(few.index.tolist()) < set(train.index.tolist())
    torch.manual_seed(123)  # the choice depends neither on --seed nor on what was drawn before
    assert torch.equal(common.load_train(MNIST, tmp_path, 10, 7, "cpu")[0].index, few.index)


def test_training_does_not_read_the_test_images(tmp_path):
    write_npz(tmp_path / "mnist.npz", test_images=None, test_labels=None)
    assert len(common.load_train(MNIST, tmp_path, 0, None, "cpu")[0].labels) == 40
    with pytest.raises(common.UsageError, match="cannot be read"):
        evaluate.load_test(MNIST, tmp_path, None, "cpu")


@pytest.mark.parametrize("changes", [
    dict(train_images=np.zeros((40, 28, 28), np.uint8)),
    dict(train_images=np.zeros((40, 28, 28, 1), np.float32)),
    dict(train_images=np.zeros((40, 32, 32, 1), np.uint8)),
    dict(train_labels=np.zeros(39, int)),
    dict(train_labels=np.zeros((40, 1), int)),
    dict(train_labels=np.full(40, 10)),
    dict(train_labels=np.full(40, -1)),
    dict(train_labels=np.zeros(40)),
    dict(train_images=None),
    dict(train_images=np.array([object()] * 40))])
def test_damaged_data_is_named(tmp_path, changes):
    write_npz(tmp_path / "mnist.npz", **changes)
    with pytest.raises(common.UsageError, match="mnist.npz"):
        common.load_train(MNIST, tmp_path, 0, None, "cpu")
    (tmp_path / "mnist.npz").write_bytes(b"<html>not found</html>")
    with pytest.raises(common.UsageError, match="mnist.npz"):
        common.load_train(MNIST, tmp_path, 0, None, "cpu")


def test_missing_data_without_a_network_is_named(tmp_path, monkeypatch):
    class Unreachable:
        url = "https://data.invalid/cifar.tar.gz"

        def __init__(self, *args, **kwargs):
            raise OSError("no network")
    monkeypatch.setattr(common.import_torchvision().datasets, "CIFAR10", Unreachable)
    named = r"cifar10.npz is missing.*data.invalid.*no network.*train_images"
    with pytest.raises(common.UsageError, match=named):
        evaluate.load_test(CIFAR10, tmp_path / "new", None, "cpu")


def test_download_writes_the_npz_once(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            assert download
            self.data = np.full((5, 32, 32, 3), 7 if train else 9, np.uint8)
            self.targets = [0, 1, 2, 3, 4]
    monkeypatch.setattr(common.import_torchvision().datasets, "CIFAR10", Fake)
    assert (evaluate.load_test(CIFAR10, tmp_path, None, "cpu").images == 9).all()
    monkeypatch.delattr(common.import_torchvision().datasets, "CIFAR10")
    train, _ = common.load_train(CIFAR10, tmp_path, 0, None, "cpu")
    assert train.images.shape == (5, 3, 32, 32)
    assert (train.images == 7).all()


def tiny_imagenet(folder, pixels=64):
    """Write tiny-imagenet-200 with three classes, four images each, two for validation, as PNGs.

    They are named as JPEGs, which loses nothing. Returns {split: [(pixels, class's name)]}.
    """
    from PIL import Image
    rng = np.random.default_rng(0)
    root = folder / "tiny-imagenet-200"
    names = ["n3", "n1", "n2"]
    images = {"train": [], "val": []}
    lines = []
    for split, number in (("train", 4), ("val", 2)):
        for i in range(number):
            for name in names:
                file = f"{name}_{i}.JPEG"
                place = root / "val" / "images"
                if split == "train":
                    place = root / "train" / name / "images"
                else:
                    file = f"val_{len(lines)}.JPEG"
                    lines.append(f"{file}\t{name}\t0\t0\t9\t9\n")
                place.mkdir(parents=True, exist_ok=True)
                array = rng.integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
                if i == 1:
                    array[..., 1:] = array[..., :1]
                picture = Image.fromarray(array)
                picture.convert("L" if i == 1 else "RGB").save(place / file, format="png")
                images[split].append((array, name))
    (root / "wnids.txt").write_text("\n".join(names))
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return images


@pytest.fixture
def three_classes(monkeypatch):
    """TinyImageNet of three classes and twelve images."""
    for name, value in dict(classes=3, images=12).items():
        monkeypatch.setitem(common.DATASETS["tinyimagenet"], name, value)


def test_tinyimagenet_as_downloaded(tmp_path, three_classes):
    """Grey images are RGB, classes are in the order of their names, the test split in its own.

    The folder is read once.
    """
    images = tiny_imagenet(tmp_path)
    facts = common.dataset_facts("tinyimagenet")
    test = evaluate.load_test(facts, tmp_path, None, "cpu")
    wanted = np.stack([array for array, _ in images["val"]]).transpose(0, 3, 1, 2)
    assert np.array_equal(test.images.numpy(), wanted)
    assert test.labels.tolist() == [2, 0, 1, 2, 0, 1]
    (tmp_path / "tiny-imagenet-200").rename(tmp_path / "elsewhere")
    train, _ = common.load_train(facts, tmp_path, 0, None, "cpu")
    ordered = [array for name in ("n1", "n2", "n3") for array, own in images["train"]
               if own == name]
    assert np.array_equal(train.images.numpy(), np.stack(ordered).transpose(0, 3, 1, 2))
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("broken, named", [
    ("wnids.txt", "No such file"), ("train/n1/images/n1_0.JPEG", "11 training images"),
    ("val/images/val_2.JPEG", "val_2.JPEG"), ("val/val_annotations.txt", "val_annotations"),
    (None, "32 x 32 pixels")])
def test_an_incomplete_tinyimagenet_is_named(tmp_path, three_classes, broken, named):
    facts = common.dataset_facts("tinyimagenet")
    tiny_imagenet(tmp_path, pixels=64 if broken else 32)
    if broken:
        (tmp_path / "tiny-imagenet-200" / broken).unlink()
    with pytest.raises(common.UsageError, match=named) as raised:
        common.load_train(facts, tmp_path, 0, None, "cpu")
    assert "cs231n.stanford.edu/tiny-imagenet-200.zip there, with wnids.txt" in str(raised.value)
    assert not (tmp_path / "tinyimagenet.npz").exists()


def test_digits():
    train, val = common.load_train(DIGITS, "nowhere", 237, None, "cpu")
    test = evaluate.load_test(DIGITS, "nowhere", None, "cpu")
    assert len(train.labels) == 1200
    assert len(val.labels) == 237
    assert len(test.labels) == 360
    assert train.images.shape[1:] == (1, 28, 28)
    assert train.images.max() > 250
    images = {image.numpy().tobytes() for image in train.images}
    assert sum(image.numpy().tobytes() in images for image in test.images) < 5


# ----------------------------------------------------------------- some classes, the user's data

def test_chosen_classes_are_kept_and_renumbered_in_their_order():
    facts = common.dataset_facts("digits", chosen=[7, 0, 3])
    assert facts["classes"] == 3
    for split in ("train", "test"):
        whole = common.load_split(DIGITS, "nowhere", split, "cpu")
        part = common.load_split(facts, "nowhere", split, "cpu")
        for position, name in enumerate([7, 0, 3]):
            kept = part.images[part.labels == position]
            assert len(kept) > 20
            assert torch.equal(kept, whole.images[whole.labels == name])
        assert sorted(part.labels.unique().tolist()) == [0, 1, 2]
        assert part.index.tolist() == list(range(len(part.labels)))
    train, val = common.load_train(facts, "nowhere", 40, 100, "cpu")
    assert len(train.labels) == 100
    assert len(val.labels) == 40


def test_classes_flag():
    assert flags_of(sat_rx, "--dataset", "digits", "--classes", "7,0,3").classes == [7, 0, 3]
    assert flags_of(sat_rx, "--dataset", "digits").classes is None
    # at most a tenth of the images that are left
    assert flags_of(sat_rx, "--dataset", "digits", "--classes", "7,0,3").val == 43
    for words in ("3", "1,1", "-1,2", "a,b", ""):
        with pytest.raises(common.UsageError, match="--classes"):
            flags_of(sat_rx, "--dataset", "digits", f"--classes={words}")
    with pytest.raises(common.UsageError, match="--classes: digits has classes 0 to 9, not 10"):
        flags_of(sat_rx, "--dataset", "digits", "--classes", "10,2")


def test_negative_labels_are_no_class(tmp_path):
    """They are refused: none may pass for the highest of the chosen classes."""
    write_npz(tmp_path / "mnist.npz", train_labels=np.arange(40) % 11 - 1)
    facts = common.dataset_facts("mnist", chosen=[3, 9])
    with pytest.raises(common.UsageError, match="mnist.npz: train_labels"):
        common.load_train(facts, tmp_path, 0, None, "cpu")


def test_no_image_of_the_chosen_classes(tmp_path):
    write_npz(tmp_path / "mnist.npz", train_labels=np.zeros(40, int))
    facts = common.dataset_facts("mnist", chosen=[4, 9])
    with pytest.raises(common.UsageError, match="--classes: no image"):
        common.load_train(facts, tmp_path, 0, None, "cpu")


@pytest.mark.parametrize("shape, like", [
    ((9, 7), "mnist"), ((9, 7, 1), "mnist"), ((9, 7, 3), "cifar10")])
def test_facts_of_the_users_own_data(tmp_path, shape, like):
    """Grey images may lack the axis of the channel; the rest is read off the arrays."""
    arrays = write_npz(tmp_path / "mine.npz", n=30, shape=shape, classes=4)
    facts = common.dataset_facts("mine", tmp_path)
    images = arrays["train_images"].reshape(30, 9, 7, -1)
    channels = images.shape[3]
    assert facts["name"] == "mine"
    assert facts["like"] == like
    assert facts["shape"] == (channels, 9, 7)
    assert facts["classes"] == 4
    assert facts["images"] == 30
    assert facts["chosen"] is None
    assert facts["eps"] == common.DATASETS[like]["eps"] == 4 * facts["step"]
    for channel in range(channels):
        values = images[..., channel].astype(float) / 255
        assert facts["mean"][channel] == pytest.approx(values.mean())
        assert facts["std"][channel] == pytest.approx(values.std())
    assert len(facts["mean"]) == len(facts["std"]) == channels
    for split in ("train", "test"):
        loaded = common.load_split(facts, tmp_path, split, "cpu")
        stored = arrays[f"{split}_images"].reshape(30, 9, 7, -1).transpose(0, 3, 1, 2)
        assert np.array_equal(loaded.images.numpy(), stored)
        assert np.array_equal(loaded.labels.numpy(), arrays[f"{split}_labels"])
    some = common.dataset_facts("mine", tmp_path, [3, 1])
    assert some["classes"] == 2
    assert some["mean"] == facts["mean"]
    with pytest.raises(common.UsageError, match="mine has classes 0 to 3, not 4"):
        common.dataset_facts("mine", tmp_path, [4, 1])


def test_own_images_of_one_colour_can_be_normalised(tmp_path):
    write_npz(tmp_path / "mine.npz", n=10, train_images=np.full((10, 8, 8, 3), 99, np.uint8))
    facts = common.dataset_facts("mine", tmp_path)
    model = common.build_model("cnn-small", facts, "dataset")
    assert model(torch.rand(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("changes, named", [
    (dict(train_images=np.zeros((40, 8, 8, 2), np.uint8)), "1 or 3 channels"),
    (dict(train_images=np.zeros((40, 64), np.uint8)), "shape"),
    (dict(train_images=np.zeros((40, 8, 8), np.float32)), "uint8"),
    (dict(train_labels=np.zeros(40, int)), "labels"),
    (dict(train_labels=np.arange(40) - 1), "labels"),
    (dict(train_labels=np.arange(40) / 2), "labels"),
    (dict(train_labels=None), "train_labels")])
def test_own_data_of_the_wrong_kind_is_named(tmp_path, changes, named):
    write_npz(tmp_path / "mine.npz", **changes)
    with pytest.raises(common.UsageError, match=f"mine.npz.*{named}"):
        common.dataset_facts("mine", tmp_path)


@pytest.mark.parametrize("changes", [
    dict(test_images=np.zeros((40, 9, 9), np.uint8)), dict(test_labels=np.full(40, 10)),
    dict(test_labels=np.full(40, -1))])
def test_own_test_images_must_be_like_the_training_images(tmp_path, changes):
    write_npz(tmp_path / "mine.npz", shape=(8, 8), **changes)
    facts = common.dataset_facts("mine", tmp_path)
    assert len(common.load_split(facts, tmp_path, "train", "cpu").labels) == 40
    with pytest.raises(common.UsageError, match="mine.npz: test_"):
        common.load_split(facts, tmp_path, "test", "cpu")


@pytest.mark.parametrize("name, meant", [("cifar", "cifar10"), ("digit", "digits"),
                                         ("mnsit", "mnist"), ("imagenet1000", "imagenet")])
def test_missing_own_data_is_refused_in_one_line(tmp_path, capsys, name, meant):
    words = ["--dataset", name, "--data-dir", tmp_path]
    with pytest.raises(SystemExit) as left:
        common.cli(lambda: flags_of(sat_rx, *words))
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.count("\n") == 1
    assert f"{name}.npz is missing" in said
    assert f"did you mean {meant}?" in said


def test_own_data_need_a_radius(tmp_path):
    """The settings are those of the data set of the same kind, but for eps."""
    write_npz(tmp_path / "mine.npz", n=100, shape=(8, 8), classes=3)
    words = ["--dataset", "mine", "--data-dir", tmp_path]
    with pytest.raises(common.UsageError, match="mine needs --eps"):
        flags_of(sat_rx, *words)
    args = flags_of(sat_rx, *words, "--eps", "0.03")
    usual = flags_of(sat_rx, "--dataset", "mnist")
    assert args.model == usual.model
    assert args.lr == usual.lr
    assert args.lam == usual.lam
    assert args.step_size == pytest.approx(usual.step_size / 10)
    assert args.val == 10


def test_a_run_on_some_classes_of_own_data(tmp_path):
    """What it wrote says what it was trained on, and holds for the test images of the classes."""
    write_npz(tmp_path / "mine.npz", n=40, shape=(12, 10, 3), classes=4)
    path = tmp_path / "run.pt"
    run_main(sat_rx.main, "sat_rx.py", "--dataset", "mine", "--data-dir", tmp_path, "--classes",
             "2,0", "--eps", "8/255", "--model", "cnn-small", "--normalize", "dataset", "--epochs",
             1, "--ckpt", path)
    facts = common.dataset_facts("mine", tmp_path, [2, 0])
    model, checkpoint = common.load_model(path, facts=facts)
    assert checkpoint["input_shape"] == (3, 12, 10)
    assert checkpoint["num_classes"] == 2
    found = common.checkpoint_facts(checkpoint)
    for key in ("name", "like", "shape", "classes", "chosen", "mean", "std"):
        assert found[key] == facts[key]
    test = evaluate.load_test(found, tmp_path, None, "cpu")
    assert set(test.labels.tolist()) == {0, 1}
    assert model(common.to_float(test.images)).shape == (len(test.labels), 2)
    assert model.mean.flatten().tolist() == pytest.approx(facts["mean"])
    for other, named in ((MNIST, "not on mnist"),
                         (common.dataset_facts("mine", tmp_path), "has 2 classes, not 4"),
                         (common.dataset_facts("mine", tmp_path, [2, 1]), "other --classes"),
                         (common.dataset_facts("mine", tmp_path, [0, 2]), "another order")):
        with pytest.raises(common.UsageError, match=named):
            common.load_model(path, facts=other)


# --------------------------------------------------------------------------------------- batches

def test_every_epoch_visits_every_image_once(tmp_path):
    write_npz(tmp_path / "mnist.npz")
    train, _ = common.load_train(MNIST, tmp_path, 10, None, "cpu")
    lookup = {i: k for k, i in enumerate(train.index.tolist())}
    orders = []
    for epoch in (0, 1, 0):
        batches = list(common.train_batches(train, 8, seed=3, epoch=epoch))
        orders.append(torch.cat([i for _, _, i in batches]))
        assert sorted(orders[-1].tolist()) == train.index.tolist()
        for x, y, i in batches:
            rows = [lookup[j] for j in i.tolist()]
            assert torch.equal(x, train.images[rows] / 255)
            assert torch.equal(y, train.labels[rows])
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


def tiny_split(n):
    """n images of one pixel."""
    return common.Split(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n), torch.arange(n))


def batch_sizes(n, batch_size):
    return [len(y) for _, y, _ in common.train_batches(tiny_split(n), batch_size, 0, 0)]


def test_steps_per_epoch_are_those_of_train_batches():
    """For many numbers of images and batch sizes; BatchNorm never gets an avoidable single one."""
    for n in range(1, 27):
        for batch_size in (1, 2, 3, 5, 8, 11):
            sizes = batch_sizes(n, batch_size)
            assert sum(sizes) == n
            assert len(sizes) == common.steps_per_epoch(n, batch_size), (n, batch_size)
            assert max(sizes) <= batch_size + 1
            if n > 1 and batch_size > 1:
                assert min(sizes) > 1


@pytest.mark.parametrize("size", [2, 3])
def test_steps_per_epoch_of_several_processes(monkeypatch, size):
    """Each gets a share of every step, or all of them refuse."""
    for n in range(1, 27):
        for batch_size in (1, 2, 3, 8, 11):
            sizes = []
            refused = 0
            for rank in range(size):
                monkeypatch.setattr(common, "ranks", lambda: (rank, size))
                try:
                    sizes.append(batch_sizes(n, batch_size))
                except common.UsageError:
                    refused += 1
            assert refused in (0, size)
            if n < size:
                assert refused
            if min(n, batch_size) >= size:
                assert not refused
            if not refused:
                steps = common.steps_per_epoch(n, batch_size)
                assert [len(share) for share in sizes] == [steps] * size
                assert sum(map(sum, sizes)) == n
                assert min(map(min, sizes)) >= 1


def test_a_leftover_image_joins_the_batch_before():
    assert batch_sizes(17, 8) == [8, 9]
    assert batch_sizes(18, 8) == [8, 8, 2]
    assert batch_sizes(16, 8) == [8, 8]
    assert batch_sizes(1, 8) == [1]
    assert batch_sizes(3, 1) == [1, 1, 1]


def crops_of(image, augment):
    """{(top, left, flip): crop} of an image (C, H, W), all that there are."""
    padding = "reflect" if augment == "reflect-flip" else "constant"
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), padding)
    _, height, width = image.shape
    crops = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top:top + height, left:left + width]
            crops[top, left, False] = crop
            crops[top, left, True] = crop[:, :, ::-1]
    return crops


@pytest.mark.parametrize("augment", ["crop", "crop-flip", "reflect-flip"])
def test_augmentation_against_a_plain_loop(augment):
    """Each image is one of its 81 x 2 crops; shifts and, but for "crop", flips both occur."""
    torch.manual_seed(0)
    x = torch.rand(30, 3, 10, 12)
    out = common.crop_and_flip(x, augment)
    found = []
    for image, result in zip(x, out):
        crops = crops_of(image, augment)
        found += [key for key, crop in crops.items() if np.array_equal(crop, result.numpy())]
    assert len(found) == 30
    assert len({top for top, _, _ in found}) > 3
    assert len({left for _, left, _ in found}) > 3
    assert {flip for _, _, flip in found} == ({False} if augment == "crop" else {False, True})


def test_augment_is_what_training_sees():
    """train_batches without augmentation gives the images, with it their crops."""
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    split = common.Split(images, torch.zeros(6), torch.arange(6))
    seen = {}
    for augment in common.AUGMENTATIONS:
        (x, _, rows), = common.train_batches(split, 6, 0, 0, augment)
        seen[augment] = x[rows.argsort()]
    assert torch.equal(seen["none"], images / 255)
    for augment in ("crop", "crop-flip", "reflect-flip"):
        assert not torch.equal(seen[augment], seen["none"])
        for image, result in zip(images / 255, seen[augment]):
            crops = crops_of(image, augment).values()
            assert any(np.array_equal(crop, result.numpy()) for crop in crops)


def test_seeds_do_not_collide():
    """Streams differ by seed, stream, epoch and step, also above 2^32; the same key repeats."""
    keys = [(0, "step", 0, 0), (1, "step", 0, 0), (0, "order", 0, 0), (0, "step", 1, 0),
            (0, "step", 0, 1), (2**32, "step", 0, 0), (2**32 + 1, "step", 0, 0),
            (2**40, "step", 0, 0)]
    draws = []
    for key in keys + keys:
        common.seed_stream(*key)
        draws.append(torch.rand(4))
    assert all(torch.equal(a, b) for a, b in zip(draws[:8], draws[8:]))
    assert len({tuple(d.tolist()) for d in draws}) == 8


@pytest.mark.parametrize("steps", [10, 1000])
def test_one_cycle(steps):
    """Highest at 30 % of the steps, where it is 1; both ends are near 0; the mean is 1/2."""
    shares = [common.one_cycle((step + 0.5) / steps) for step in range(steps)]
    assert common.one_cycle(0.3) == pytest.approx(1)
    assert common.one_cycle(0) == 0
    assert common.one_cycle(1) == 0
    assert 0 < min(shares)
    assert shares[0] <= 2 / steps
    assert shares[-1] <= 2 / steps
    assert 1 - 2 / steps < max(shares) <= 1
    highest = shares.index(max(shares))
    assert highest in (3 * steps // 10 - 1, 3 * steps // 10)
    assert shares[:highest + 1] == sorted(shares[:highest + 1])
    assert shares[highest:] == sorted(shares[highest:], reverse=True)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05 / steps)


# ------------------------------------------------------------------------------------- backbones

@pytest.mark.parametrize("name, dataset, parameters", [
    ("lenet+", "mnist", 832 + 51_264 + 3_212_288 + 10_250), ("wrn-28-10", "cifar10", 36_479_194),
    ("resnet18", "cifar10", 11_173_962), ("resnet34", "cifar10", 21_282_122),
    ("vgg11", "cifar10", 9_231_114), ("vgg19", "cifar10", 20_040_522),
    ("densenet-bc-100", "cifar10", 769_162), ("resnet50", "cifar100", 23_705_252),
    ("wrn-16-4", "cifar10", 2_748_890), ("wrn-32-10", "cifar10", None),
    ("eat-a", "mnist", 1_664 + 102_464 + 25_600 * 128 + 128 + 1_290),
    ("eat-b", "mnist", 64 * 65 + 128 * 2305 + 128 * 3201 + 10 * (128 * 144 + 1)),
    ("eat-c", "mnist", 1_280 + 73_792 + 204_928 + 1_290),
    ("eat-d", "mnist", 235_500 + 3 * 90_300 + 3_010)])
def test_backbones(name, dataset, parameters):
    """Parameter counts as published; WRN-32 has five blocks in each group."""
    facts = common.dataset_facts(dataset)
    model = common.build_model(name, facts)
    if name in ("resnet18", "vgg11", "densenet-bc-100", "eat-b"):
        assert model(torch.rand(2, *facts["shape"])).shape == (2, 10)
    if parameters:
        assert sum(p.numel() for p in model.parameters()) == parameters
    else:
        assert sum(isinstance(m, common.WideBlock) for m in model.modules()) == 15


@pytest.mark.parametrize("name", [
    "wrn-27-10", "wrn-4-1", "wrn-28-0", "wrn", "resnet", "resnet20", "vgg16", "lenet", "",
    "os.system", "vgg11"])  # VGG-11 halves 28 pixels once too often
def test_unknown_backbones_are_refused(name):
    with pytest.raises(common.UsageError, match="model"):
        common.build_model(name, MNIST)


@pytest.mark.parametrize("name", ["vgg11", "eat-a"])
@pytest.mark.parametrize("channels", [1, 3])
def test_too_small_images_are_refused_in_one_line(name, channels, capsys):
    facts = dict(MNIST if channels == 1 else CIFAR10, shape=(channels, 6, 6))
    with pytest.raises(SystemExit) as left:
        common.cli(lambda: common.build_model(name, facts))
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.count("\n") == 1
    assert f"--model {name}: does not take images of 6 x 6 pixels and {channels} channels" in said


OWN_NET = """
import argparse
import torch
import neighbour_of_my_net

argparse.ArgumentParser().parse_args()

def five():
    return neighbour_of_my_net.layers(5)

def any_number(num_classes=7):
    return neighbour_of_my_net.layers(num_classes)

def nothing():
    pass

def too_many_channels():
    return torch.nn.Conv2d(4, 4, 3)
"""
NEIGHBOUR = """
import torch

def layers(classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, classes))
"""


def test_own_network_with_a_neighbouring_module(tmp_path, monkeypatch):
    """It is imported as from its own folder, sees none of our flags, and may take num_classes."""
    (tmp_path / "my_net.py").write_text(OWN_NET)
    (tmp_path / "neighbour_of_my_net.py").write_text(NEIGHBOUR)
    words = ["sat_rx.py", "--model", "my_net.py:any_number"]
    monkeypatch.setattr("sys.argv", words)
    path_before = list(common.sys.path)
    facts = dict(MNIST, shape=(1, 6, 6))
    net = f"{tmp_path}/my_net.py"
    for classes in (2, 5, 10):
        model = common.build_model(f"{net}:any_number", dict(facts, classes=classes))
        assert model(torch.rand(3, 1, 6, 6)).shape == (3, classes)
    model = common.build_model(f"{net}:five", dict(facts, classes=5))
    assert model(torch.rand(3, 1, 6, 6)).shape == (3, 5)
    for function, named in (("five", r"\(1, 5\).*must be \(1, 10\)"), ("nothing", "NoneType"),
                            ("too_many_channels", "does not take images of 6 x 6"),
                            ("misspelt", "AttributeError")):
        with pytest.raises(common.UsageError, match=f"my_net.py:{function}: .*{named}"):
            common.build_model(f"{net}:{function}", facts)
    with pytest.raises(common.UsageError, match="FileNotFoundError"):
        common.build_model(f"{tmp_path}/no_net.py:five", facts)
    assert common.sys.argv == words
    assert common.sys.path == path_before


def test_evaluation_does_not_depend_on_the_batch():
    """A network with BatchNorm in eval mode: the same logits at batch 1 and 20, and `correct`."""
    torch.manual_seed(0)
    model = common.build_model("wrn-10-1", CIFAR10)
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    split = common.Split(images, torch.randint(0, 10, (20,)), torch.arange(20))
    x = common.to_float(split.images)
    model(x)  # BatchNorm statistics that are not the initial ones
    model.eval()
    alone = torch.cat([model(x[i:i + 1]) for i in range(20)])
    torch.testing.assert_close(alone, model(x), rtol=1e-4, atol=1e-5)
    model.train()
    one_by_one = common.correct(model, split, batch_size=1)
    assert torch.equal(one_by_one, common.correct(model, split, batch_size=20))
    assert model.training
    assert not torch.allclose(model(x), model.eval()(x))


def test_normalisation_is_inside_the_model():
    x = torch.rand(4, 3, 32, 32)
    net = torch.nn.Flatten()
    mean = torch.tensor(CIFAR10["mean"]).view(3, 1, 1)
    std = torch.tensor(CIFAR10["std"]).view(3, 1, 1)

    def normalised(x, normalize):
        return common.Classifier(net, normalize, CIFAR10["mean"], CIFAR10["std"])(x)
    by_dataset = normalised(x, "dataset").view_as(x)
    torch.testing.assert_close(by_dataset, (x - mean) / std)
    by_image = normalised(x, "image")
    torch.testing.assert_close(by_image.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_image.std(1, correction=0), torch.ones(4))
    assert (normalised(torch.full_like(x, 0.3), "image").abs() < 1e-3).all()
    torch.testing.assert_close(plain(net)(x).view_as(x), x)


def test_logits_are_float32_under_autocast():
    model = common.build_model("lenet+", MNIST)
    x = torch.rand(2, 1, 28, 28)
    with common.autocast(torch.device("cpu"), "bfloat16"):
        low = model(x)
        assert low.dtype == torch.float32
        assert common.cross_entropy(low, torch.tensor([1, 2])).dtype == torch.float32
    assert torch.equal(low, low.bfloat16().float()), "autocast was on"
    with common.autocast(torch.device("cpu"), "float32"):
        high = model(x)
    assert not torch.equal(high, high.bfloat16().float())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lenet_plus_is_the_network_with_relu_first(precision):
    """Pooling before ReLU changes neither logits nor any gradient, bit for bit."""
    torch.manual_seed(0)
    model = common.build_model("lenet+", MNIST)
    layers = list(model.net)
    usual = torch.nn.Sequential(*(layers[i] for i in (0, 2, 1, 3, 5, 4, 6, 7, 8, 9)))
    assert isinstance(usual[1], torch.nn.ReLU)
    x = torch.rand(20, 1, 28, 28, requires_grad=True)
    results = []
    for net in (model.net, usual):
        with common.autocast(torch.device("cpu"), precision):
            logits = net(x)
        grads = torch.autograd.grad(logits.square().sum(), [x, *model.parameters()])
        results.append([logits.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ----------------------------------------------------------------------------- numbers and flags

def test_meter():
    """Means weighted by batch size, over more steps than are read at once.

    A bad value is named with its step.
    """
    meter = common.Meter(epoch=2)
    values = torch.rand(120)
    sizes = [32] * 119 + [5]
    for size, value in zip(sizes, values):
        meter.add(size, {"loss": value, "ce": 2 * value})
    expected = np.average(values.numpy(), weights=sizes)
    assert meter.read() == pytest.approx({"loss": expected, "ce": 2 * expected}, rel=1e-6)
    meter = common.Meter(epoch=2)
    with pytest.raises(common.UsageError, match="ce is nan at epoch 3, step 61"):
        for step in range(120):
            ce = torch.tensor(float("nan") if step >= 60 else 1.0)
            meter.add(8, {"loss": torch.tensor(1.0), "ce": ce})


@pytest.mark.parametrize("text, value", [("8/255", 8 / 255), ("0.031", 0.031), ("1", 1.0),
                                         ("1e-3", 1e-3)])
def test_eps_is_a_fraction_or_a_number(text, value):
    assert common.unit(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "8", "1/0", "8/", "nan", "inf", "", "256/255"])
def test_eps_outside_the_unit_interval_is_refused(text):
    with pytest.raises(Exception, match="out of range|not a number"):
        common.unit(text)
