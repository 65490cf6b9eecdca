"""CleanAT's shared module: what must not drift between methods. Flags, set-up, data, backbones, attacks, checkpoints.

Conventions: images are float32 in [0, 1], (N, C, H, W); labels int64, (N,); a model maps images to float32 logits,
(N, classes); eps and step sizes are in [0, 1] units, a number or a tensor of one value per sample. Losses passed to
attacks are per sample: loss(logits, target) -> (N,). Randomness is a pure function of (seed, stream, epoch, step).
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from fractions import Fraction
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows: runs work, two of them on one path are not kept apart
    fcntl = None

# The threat model the field uses on each data set: eps (L-infinity) and PGD's step, with the pixel statistics.
DATASETS = {
    "digits": dict(classes=10, shape=(1, 28, 28), eps=0.1, step=0.02, augment="", mean=(0.307,), std=(0.314,)),
    "mnist": dict(classes=10, shape=(1, 28, 28), eps=0.3, step=0.01, augment="", mean=(0.1307,), std=(0.3081,)),
    "cifar10": dict(classes=10, shape=(3, 32, 32), eps=8 / 255, step=2 / 255, augment="constant",
                    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": dict(classes=100, shape=(3, 32, 32), eps=8 / 255, step=2 / 255, augment="constant",
                     mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "imagenet": dict(classes=1000, shape=(3, 224, 224), eps=16 / 255, step=1 / 255, augment="",  # files crop themselves
                     mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}
DATASETS["imagenet100"] = dict(DATASETS["imagenet"], classes=100, eps=8 / 255, step=2 / 255)  # 100 classes of it


# ------------------------------------------------------------------------------------------------ errors and flags

class UsageError(Exception):
    """Something the user can put right: `cli` prints it in one line and exits with status 2, without a traceback."""


def cli(main):
    """Run a script's main() the way a user expects: their mistakes in one line, Ctrl-C without a traceback."""
    try:
        main()
        if ranks()[1] > 1:  # of a process that fails torchrun ends the others; it could wait for them here for ever
            torch.distributed.destroy_process_group()
    except UsageError as error:
        if ranks()[0] == 0 or torch.distributed.is_initialized():  # in the flags it is every process's
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted: what was saved is kept", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory, a smaller --batch-size may fit ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


class Parser(argparse.ArgumentParser):
    """argparse with `error: ...` in one line instead of the usage of forty flags."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise UsageError(f"{message} (--help lists the flags)")


def number(low, high=math.inf, kind=float, above=False):
    """An argparse type: a number (quotients such as 2.5/255 too) in [low, high], or in (low, high] if `above`."""
    def parse(text):
        try:
            top, bottom = text.split("/") if kind is float and "/" in text else (text, 1)
            value = kind(top) if kind is int else float(Fraction(top) / Fraction(bottom))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}")
        if not low <= value <= high or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value
    return parse


unit = number(0, 1, above=True)  # eps and step sizes: in [0, 1] units, 0 < eps <= 1
count = number(1, kind=int)
natural = number(0, kind=int)


def shared_flags(parser, datasets):
    """The flags every training script has. A default of None: the paper's value for the data set (see `resolve`)."""
    flag = parser.add_argument
    flag("--dataset", choices=list(datasets), default=next(iter(datasets)), help="data set (%(default)s)")
    flag("--data-dir", default="data", help="folder that holds NAME.npz, or ImageNet's images as "
         "imagenet/train/CLASS/NAME.JPEG and imagenet/val (%(default)s)")
    flag("--model", help=f"backbone: {BACKBONES} (the paper's for the data set)")
    flag("--normalize", choices=["none", "dataset", "image"], help="a normalising layer inside the model: by the "
         "data set's mean and deviation, or image by image (the paper's)")
    flag("--epochs", type=count, help="training epochs (the paper's)")
    flag("--batch-size", type=count, help="images per step (the paper's)")
    flag("--lr", type=number(0, above=True), help="initial learning rate of SGD (the paper's)")
    flag("--weight-decay", type=number(0), help="weight decay of SGD (the paper's)")
    flag("--momentum", type=number(0, 1), help="momentum of SGD (the paper's)")
    flag("--eps", type=unit, help="radius of the adversary in [0, 1] units, 8/255 or 0.031; of DRA the mean "
         "change per value (the paper's)")
    flag("--val", type=natural, help="training images kept for validation; 0: none (the paper's)")
    flag("--seed", type=natural, default=0, help="seed of everything random (%(default)s)")
    flag("--init", metavar="CKPT", help="start from the last weights of this checkpoint")
    flag("--ckpt", help="where to write the run (runs/SCRIPT-DATASET-TIME.pt)")
    flag("--resume", action="store_true", help="go on with the run at --ckpt; start it if there is none")
    flag("--overwrite", action="store_true", help="replace the run at --ckpt")
    flag("--limit", type=count, help="train and validate on a fixed random subset of N images")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    flag("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
         help="of training; auto: bfloat16 autocast where the hardware computes in it (%(default)s)")
    flag("--attack-mode", choices=["eval", "train"], default="eval",
         help="mode of BatchNorm and dropout while a training attack runs (%(default)s)")
    wandb_flag(parser)


def refuse_unused(args, choice, uses):
    """UsageError where a flag was given that the method does not read. To be called before `resolve`.

    choice: the flag that names the method; uses: flag -> the methods that read it.
    """
    for name, methods in uses.items():
        value, method = getattr(args, name), getattr(args, choice)
        if value not in (None, []) and value is not False and method not in methods:
            raise UsageError(f"--{choice} {method} has no use for --{name.replace('_', '-')}: that is for "
                             f"{', '.join(methods)}")


def workers_flag(parser):
    parser.add_argument("--workers", type=natural, default=4, help="processes that read image files, for each GPU; "
                        "data sets that are held in memory need none (%(default)s)")


def wandb_flag(parser):
    parser.add_argument("--wandb", choices=["auto", "online", "offline", "disabled"], default="auto", help="Weights & "
                        "Biases; auto: online where a key is configured, else offline; WANDB_MODE wins (%(default)s)")


def resolve(args, paper):
    """Fill every flag left at None from `paper`, the script's table for this data set; returns args."""
    for name, value in paper.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.resume and args.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it: give one of them")
    return args


# ---------------------------------------------------------------------------------------------------------- set-up

def ranks():
    """(number of this process, how many there are) under torchrun; (0, 1) without."""
    if "LOCAL_RANK" not in os.environ:  # a cluster's scheduler may set the others
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def set_up(device="auto", precision="auto", parallel=False):
    """(torch.device, "float32" or "bfloat16"), with auto resolved. float32 means float32: TF32 is off.

    parallel: the script can run as several processes under torchrun. They are joined here, each gets the GPU of its
    number, and the first alone prints.
    """
    rank, size = ranks()
    if size > 1 and not parallel:
        raise UsageError("this script runs as one process: start it with python, not with torchrun")
    try:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(best if device == "auto" else device)
        if size > 1 and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # AMX or AVX512-BF16: 3 to 4 times faster than float32; elsewhere bfloat16 is emulated and slow
            fast = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("amx_tile", "avx512_bf16"))
        precision = "bfloat16" if fast else "float32"
    if size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")
    return device, precision


def autocast(device, precision):
    """The context of a training step: bfloat16 autocast, or nothing in float32. Logits and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def seed_stream(seed, stream, epoch=0, step=0):
    """Seed torch's generators by a pure function of the arguments: a resumed run needs no saved random state."""
    key = (int.from_bytes(stream.encode(), "little"), epoch, step)
    torch.manual_seed(int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0]))


# ------------------------------------------------------------------------------------------------------------ data

class Split(NamedTuple):
    """Part of a data set, on the device: images uint8 (N, C, H, W), or an ImageFiles; labels (N,); index (N,), each
    image's position in the whole split."""
    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor

    def take(self, rows):
        return Split(self.images[rows], self.labels[rows], self.index[rows])


class ImageFiles(torch.utils.data.Dataset):
    """Image files in the place of a Split's tensor, cut to `shape` as processes read them: the middle of the image, or,
    where `draw` is (seed, epoch), torchvision's random crop and flip, a pure function of draw and position."""

    def __init__(self, paths, shape, workers, draw=None):
        """paths: array of bytes (N,); shape: (3, H, H); workers: how many processes read."""
        self.paths, self.workers, self.draw, self.shape = paths, workers, draw, (len(paths), *shape)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        """An image, uint8 (3, H, H), at a whole number; an ImageFiles at a tensor of them."""
        if torch.is_tensor(rows):
            return ImageFiles(self.paths[rows.cpu().numpy()], self.shape[1:], self.workers)
        from PIL import Image
        transforms, size = import_torchvision().transforms, self.shape[-1]
        if self.draw:
            seed_stream(self.draw[0], "crop", self.draw[1], rows)
            steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        else:
            steps = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        try:
            with Image.open(os.fsdecode(self.paths[rows])) as image:
                return transforms.Compose([*steps, transforms.PILToTensor()])(image.convert("RGB"))
        except Exception as error:
            raise UsageError(f"{os.fsdecode(self.paths[rows])} cannot be read ({error!r})")


def read(split, chunks, draw=None):
    """The images of a split at each tensor of positions in `chunks`, as models want them: float32 in [0, 1],
    channels_last, on the split's device. draw: (seed, epoch), where files are to be cropped and flipped at random."""
    if torch.is_tensor(split.images):
        yield from (to_float(split.images[rows]) for rows in chunks)
        return
    files = ImageFiles(split.images.paths, split.images.shape[1:], split.images.workers, draw)
    device = split.labels.device
    loader = torch.utils.data.DataLoader(files, batch_sampler=[rows.tolist() for rows in chunks],
                                         num_workers=files.workers, pin_memory=device.type == "cuda")
    try:
        yield from (to_float(images.to(device, non_blocking=True)) for images in loader)
    except UsageError as error:  # a process that reads sends its traceback, too
        raise UsageError(str(error).splitlines()[-1].split("UsageError: ")[-1])
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UsageError(f"a process that reads images ended ({error}): give the machine or the container more shared "
                         "memory, or use --workers 0")


def subset(n, size, seed=0):
    """A fixed random `size` of range(n), sorted; all of it where size is None. Independent of --seed."""
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]
    return rows.sort().values


def load_train(name, data_dir, val, limit, device, workers=0):
    """The training split without and the `val` images kept for validation (a fixed choice); (Split, Split)."""
    whole = load_split(name, data_dir, "train", device, workers)
    n = len(whole.labels)
    if val >= n:
        raise UsageError(f"--val {val} leaves nothing of the {n} training images of {name}")
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[subset(n, val)] = True
    train, held_out = whole.take((~held_out).nonzero()[:, 0]), whole.take(held_out.nonzero()[:, 0])
    return train.take(subset(n - val, limit)), held_out.take(subset(val, limit))


def load_split(name, data_dir, split, device, workers=0):
    """The whole "train" or "test" Split of a data set, from {data_dir}/{name}.npz; UsageError where that fails.

    ImageNet is a folder of files, which `workers` processes read: {data_dir}/imagenet/train/CLASS/*.JPEG, and val;
    imagenet100 is a fixed random choice of its classes.
    """
    if name.startswith("imagenet"):
        folder = Path(data_dir) / "imagenet" / ("train" if split == "train" else "val")
        images, labels = image_folder(folder, name, workers)
        return Split(images, labels.to(device), torch.arange(len(labels), device=device))
    if name == "digits":
        images, labels = digits(split)
    else:
        path = Path(data_dir) / f"{name}.npz"
        if not path.exists():
            download(name, path)
        try:
            with np.load(path) as arrays:  # lazy: training never reads the test images
                images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        except Exception as error:
            raise UsageError(f"{path} cannot be read ({error!r}): remove it, or put a sound {name}.npz there")
        c, h, w = DATASETS[name]["shape"]
        classes = DATASETS[name]["classes"]
        if images.dtype != np.uint8 or images.shape[1:] != (h, w, c) or not len(images):
            raise UsageError(f"{path}: {split}_images must be uint8 of shape (N, {h}, {w}, {c})")
        known = labels.dtype.kind in "iu" and np.isin(labels, range(classes)).all()
        if labels.shape != images.shape[:1] or not known:
            raise UsageError(f"{path}: {split}_labels must be whole numbers of shape (N,) from 0 to {classes - 1}")
        images = images.transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    labels = torch.from_numpy(labels.astype(np.int64)).to(device)
    return Split(images, labels, torch.arange(len(labels), device=device))


def image_folder(folder, name, workers):
    """(ImageFiles, labels) of a folder with a folder of images for each class of ImageNet, numbered by the order of
    their names, or of as many classes, chosen at random once and for all, as the data set has."""
    whole, facts = DATASETS["imagenet"]["classes"], DATASETS[name]
    try:
        found = import_torchvision().datasets.ImageFolder(folder)
    except OSError as error:
        raise UsageError(f"{folder} must hold the images of https://image-net.org, unpacked and sorted into a folder "
                         f"for each class, as in {folder}/n01440764/NAME.JPEG ({error})")
    if len(found.classes) != whole:
        raise UsageError(f"{folder} holds {len(found.classes)} classes, ImageNet has {whole}")
    number = {chosen: i for i, chosen in enumerate(subset(whole, facts["classes"]).tolist())}
    paths, labels = zip(*((os.fsencode(path), number[label]) for path, label in found.samples if label in number))
    return ImageFiles(np.array(paths), facts["shape"], workers), torch.tensor(labels)


def digits(split):
    """scikit-learn's bundled 1,797 digits of 8x8 pixels, resized to 28x28; a fixed split of 1,437 / 360."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the data set 'digits' comes with scikit-learn: pip install scikit-learn")
    bunch = load_digits()
    images = F.interpolate(torch.from_numpy(bunch.images / 16).float()[:, None], size=(28, 28), mode="bilinear")
    images = images.mul(255).round().to(torch.uint8).numpy()
    rows = np.random.default_rng(0).permutation(len(images))
    rows = rows[:1437] if split == "train" else rows[1437:]
    return images[rows], bunch.target[rows]


def download(name, path):
    """Write {name}.npz once from torchvision's download: uint8 NHWC images, int64 labels, train_* and test_*."""
    names = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    sets = getattr(import_torchvision().datasets, names[name])
    print(f"{path} is missing: downloading {name}", flush=True)
    arrays = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            part = sets(path.parent, train=split == "train", download=True)
            images = np.asarray(part.data)
            arrays[f"{split}_images"] = images if images.ndim == 4 else images[..., None]
            arrays[f"{split}_labels"] = np.asarray(part.targets, dtype=np.int64)
        write_beside(path, lambda file: np.savez(file, **arrays))
    except Exception as error:
        where = getattr(sets, "mirrors", None) or [getattr(sets, "url", "")]
        raise UsageError(f"{path} is missing and {name} could not be downloaded from {where[0]} ({error}): put an npz "
                         "there with train_images, test_images (uint8, NHWC), train_labels, test_labels (int64)")


def import_torchvision():
    """torchvision; beside a CPU-only torch its wheel's compiled operators do not load and the import would fail."""
    try:
        import torchvision
    except ImportError:
        raise UsageError("torchvision is not installed: pip install torchvision")
    except RuntimeError:  # declare the two operators it looks up; nothing here calls them
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def to_float(images):
    """uint8 images as the models want them: float32 in [0, 1], channels_last in memory."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


def progress(batches, name):
    """A progress bar over a sequence while standard error is a terminal."""
    return tqdm(batches, desc=name, leave=False, disable=ranks()[0] > 0 or None)


def eval_batches(split, batch_size=None, name="evaluating"):
    """(x, y, rows) over a split in order, with a progress bar; `rows` are positions in the split. batch_size: 500 by
    default, 50 where the images are files."""
    batch_size = batch_size or (500 if torch.is_tensor(split.images) else 50)
    chunks = torch.arange(len(split.labels), device=split.labels.device).split(batch_size)
    for rows, x in zip(progress(chunks, name), read(split, chunks)):
        yield x, split.labels[rows], rows


def train_batches(split, batch_size, seed, epoch, augment):
    """(x, y, index) over a shuffled split, with a progress bar; seeds torch for each step before drawing from it.

    `index` is each image's position in the whole training set. `augment`: how to pad before crop and flip, a mode of
    torch's pad ("constant": by zeros), "crop" for zeros and no flip, or "" for neither. Under torchrun every process
    gets its share of each step's images, and randomness of its own.
    """
    seed_stream(seed, "order", epoch)
    (rank, size), chunks = ranks(), list(torch.randperm(len(split.labels)).to(split.labels.device).split(batch_size))
    if len(chunks[-1]) < size:  # too few for all
        chunks[-2:] = [torch.cat(chunks[-2:])]
    if len(chunks[-1]) < size:
        raise UsageError(f"{len(split.labels)} training images are too few for {size} processes")
    chunks = [rows[rank::size] for rows in chunks]
    for step, (rows, x) in enumerate(zip(progress(chunks, f"epoch {epoch + 1}"), read(split, chunks, (seed, epoch)))):
        seed_stream(seed, "step", epoch, step * size + rank)
        yield crop_and_flip(x, augment) if augment else x, split.labels[rows], split.index[rows]


def crop_and_flip(x, mode="constant", pad=4):
    """Random crop after padding, then, but for mode "crop", a random horizontal flip, per image; (N, C, H, W)."""
    n, c, h, w = x.shape
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1, 1), device=x.device)
    columns = torch.arange(w, device=x.device).expand(n, 1, w)
    flipped = torch.rand(n, 1, 1, device=x.device) < (0.0 if mode == "crop" else 0.5)
    columns = torch.where(flipped, columns.flip(2), columns)
    rows = torch.arange(h, device=x.device)[None, :, None] + top
    padded = F.pad(x, [pad] * 4, "constant" if mode == "crop" else mode).permute(0, 2, 3, 1)
    crop = padded[torch.arange(n, device=x.device)[:, None, None], rows, columns + left]  # (N, H, W, C)
    return crop.permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------- backbones

class Classifier(nn.Module):
    """A backbone as attacks and losses see it: takes images in [0, 1], normalises inside, returns float32 logits."""

    def __init__(self, net, normalize, mean, std, contiguous=False):
        super().__init__()
        self.net, self.normalize, self.contiguous = net, normalize, contiguous
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalized(self, x):
        """Images as the backbone sees them."""
        if self.normalize == "dataset":
            x = (x - self.mean) / self.std
        elif self.normalize == "image":  # the deviation has the usual floor: a constant image maps to zero
            std = x.flatten(1).std(1, correction=0).clamp(min=x[0].numel() ** -0.5)
            x = (x - x.mean((1, 2, 3), keepdim=True)) / std.view(-1, 1, 1, 1)
        return x

    def forward(self, x, normalize=True):
        """Logits (N, classes) of images in [0, 1], or of images as `normalized` returns them."""
        x = self.normalized(x) if normalize else x
        logits = self.net(x.contiguous() if self.contiguous else x)
        return logits.float() if logits.dtype == torch.bfloat16 else logits


BACKBONES = ("lenet+, cnn-small, wrn-DEPTH-WIDTH (as in wrn-28-10), resnet18, 34, 50, 101 or 152, vgg11, 13 or 19, "
             "densenet-bc-100, eat-a to eat-d, or your own: path/to/file.py:function")


def build_model(name, dataset, normalize="none", device="cpu"):
    """A freshly initialised Classifier for a data set, channels_last; raises UsageError for an unknown backbone.

    "path/to/file.py:function" imports the file and calls the function, which returns the network.
    """
    facts = DATASETS[dataset]
    channels, height, width = facts["shape"]
    if ".py:" in name:
        net = imported_net(name)
    elif name == "lenet+":
        net = lenet_plus(channels, height, width, facts["classes"])
    elif name == "cnn-small":
        net = cnn_small(channels, height, width, facts["classes"])
    elif match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, widen = map(int, match.groups())
        blocks = {32: 5}.get(depth, (depth - 4) / 6)  # WRN-32 fits no such depth; the field builds it with five blocks
        if blocks < 1 or blocks != int(blocks) or widen < 1:
            raise UsageError(f"--model {name}: the depth of a WRN is 6 n + 4 (10, 16, 22, 28, 34, 40 ...) or 32")
        net = WideResNet(int(blocks), widen, channels, facts["classes"])
    elif re.fullmatch("eat-[abcd]", name):
        net = eat_source(name[-1], channels, height, width, facts["classes"])
    elif re.fullmatch("resnet(18|34|50|101|152)|vgg(11|13|19)|densenet-bc-100", name):
        net = torchvision_net(name, channels, height, facts["classes"])
    else:
        raise UsageError(f"unknown model {name!r}: choose {BACKBONES}")
    if ".py:" in name:  # may use view(), which needs the usual order in memory
        return Classifier(net, normalize, facts["mean"], facts["std"], contiguous=True).to(device)
    model = Classifier(net, normalize, facts["mean"], facts["std"])
    return model.to(device, memory_format=torch.channels_last)


def lenet_plus(channels, height, width, classes):
    """LeNet+ (SAT-Rx, table 1); the 5x5 convolutions are padded by 2, so 28x28 images give 3,136 features. ReLU comes
    after max-pooling: the same function and gradient, a sixth faster."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 1024), nn.ReLU(), nn.Linear(1024, classes))


def cnn_small(channels, height, width, classes):
    """The MNIST network of fast adversarial training (Wong et al. 2020): two convolutions of stride 2, two layers."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), 100), nn.ReLU(), nn.Linear(100, classes))


def imported_net(name):
    """The network that a user's function returns, "path/to/file.py:function"; UsageError where it does not."""
    path, _, function = name.rpartition(":")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        net = getattr(module, function)()
    except Exception as error:
        raise UsageError(f"--model {name}: {type(error).__name__}: {error}")
    if not isinstance(net, nn.Module):
        raise UsageError(f"--model {name}: {function}() must return a torch.nn.Module, not {type(net).__name__}")
    return net


def eat_source(letter, channels, height, width, classes):
    """Source model A, B, C or D of ensemble adversarial training (SAT-Rx, table 1); unpadded, stride 1."""
    if letter == "a":
        layers = [nn.Conv2d(channels, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.Dropout(0.25),
                  nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Dropout(0.5)]
    elif letter == "b":
        layers = [nn.Dropout(0.2), nn.Conv2d(channels, 64, 8), nn.ReLU(), nn.Conv2d(64, 128, 6), nn.ReLU(),
                  nn.Conv2d(128, 128, 5), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    elif letter == "c":
        layers = [nn.Conv2d(channels, 128, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(128, 64, 3), nn.Tanh(),
                  nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(128), nn.ReLU()]
    else:
        hidden = [(nn.LazyLinear(300), nn.ReLU(), nn.Dropout(0.5)) for _ in range(4)]
        layers = [nn.Flatten(), *(layer for triple in hidden for layer in triple)]
    net = nn.Sequential(*layers, nn.LazyLinear(classes)).eval()
    net(torch.zeros(1, channels, height, width))  # sets the sizes that the lazy layers leave open
    return net.train()


def torchvision_net(name, channels, height, classes):
    """torchvision's ResNets, VGGs (with BatchNorm) and DenseNet-BC-100. Images below 64 pixels get the usual small
    stem, a 3x3 convolution of stride 1 without max-pool, and VGGs one linear layer behind the convolutions."""
    models = import_torchvision().models
    if name.startswith("densenet"):  # depth 100 = 3 blocks of 16 bottlenecks, 2 convolutions each, + 4; growth 12
        net = models.DenseNet(growth_rate=12, block_config=(16, 16, 16), num_init_features=24, num_classes=classes)
    else:
        net = getattr(models, f"{name}_bn" if name.startswith("vgg") else name)(num_classes=classes)
    if height >= 64:
        return net
    if name.startswith("vgg") and height < 32:
        raise UsageError(f"--model {name} halves its images five times: {height} pixels are too few, 32 are needed")
    if name.startswith("densenet"):
        net.features.conv0 = nn.Conv2d(channels, 24, 3, padding=1, bias=False)
        net.features.norm0, net.features.relu0, net.features.pool0 = nn.Identity(), nn.Identity(), nn.Identity()
    elif name.startswith("vgg"):
        net.features[0], net.avgpool = nn.Conv2d(channels, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1)
        net.classifier = nn.Linear(512, classes)
    else:
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.Identity()
    return net


class WideBlock(nn.Module):
    """Pre-activation residual block: BN-ReLU-conv twice; a 1x1 shortcut from the activation where shapes differ."""

    def __init__(self, inside, out, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inside, out, 1, stride, bias=False) if (inside, 1) != (out, stride) else None

    def forward(self, x):
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Sequential):
    """Wide residual network (Zagoruyko and Komodakis 2016): three groups of `blocks`, 16, 32, 64 times `widen` wide."""

    def __init__(self, blocks, widen, channels, classes):
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        groups = [WideBlock(widths[g] if b == 0 else widths[g + 1], widths[g + 1], 2 if g and b == 0 else 1)
                  for g in range(3) for b in range(blocks)]
        super().__init__(nn.Conv2d(channels, 16, 3, padding=1, bias=False), *groups, nn.BatchNorm2d(widths[3]),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[3], classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# --------------------------------------------------------------------------------------------- losses and attacks

def cross_entropy(logits, y):
    """Cross-entropy per sample, (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


def kl(logits, reference):
    """KL(softmax(reference) || softmax(logits)) per sample, (N,); finite for any finite logits, gradients into both."""
    log_p, log_q = F.log_softmax(reference, 1), F.log_softmax(logits, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def margin(logits, y):
    """Highest wrong logit minus the true one, per sample: above 0 where misclassified; the loss of PGD-CW."""
    true = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], -math.inf).amax(1) - true


@contextlib.contextmanager
def model_mode(model, mode):
    """Put every submodule into "train" or "eval" mode, and back into its own on leaving, also after an exception."""
    before = [(module, module.training) for module in model.modules()]
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def input_gradient(model, x, target, loss=cross_entropy):
    """(gradient of each sample's loss with respect to its image, logits), in the model's present mode, detached.

    Only the input is differentiated: no parameter's .grad is read or written.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        return torch.autograd.grad(loss(logits, target).sum(), x)[0], logits.detach()


def per_sample(value, x):
    """A number or an (N,) tensor, broadcastable against x (N, C, H, W)."""
    value = value.to(x) if torch.is_tensor(value) else torch.full((len(x),), value, dtype=x.dtype, device=x.device)
    return value.view(-1, *[1] * (x.dim() - 1))


def linf_attack(model, x, target, eps, step, steps, loss=cross_entropy, start=None, momentum=None, targeted=False,
                restarts=1, labels=None, mode="eval"):
    """The gradient loop of every L-infinity attack: x' <- clip(x' + step * sign(g)) into the eps-ball and [0, 1].

    x: images in [0, 1], (N, C, H, W), else ValueError. target: what `loss` compares logits with, a row per sample:
    labels, or reference logits for kl. eps, step: numbers or (N,) tensors. start: function (x, eps) -> first iterate, x
    itself by default. momentum: mu of MI-FGSM (SAT-Rx eq. 10), None for plain steps. targeted: descend the loss.
    labels (evaluation): the first iterate that is not classified as its label is a sample's result, and neither further
    steps nor further restarts attack it. mode: the model's while attacked, "eval" or "train", restored after.
    Returns the perturbed images, detached.
    """
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError("attacks take images in [0, 1]: normalisation belongs inside the model")
    x, eps, step = x.detach(), per_sample(eps, x), per_sample(step, x) * (-1 if targeted else 1)
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    result, rows = x.clone(), torch.arange(len(x), device=x.device)  # rows: the samples still attacked
    with model_mode(model, mode):
        for _ in range(restarts):
            x_adv = x if start is None else start(x, eps)  # drawn for all: no sample's start depends on the others
            x_adv, y, alpha, low, high = (t[rows] for t in (x_adv, target, step, lower, upper))
            velocity = torch.zeros_like(x_adv)
            for _ in range(steps):
                grad, logits = input_gradient(model, x_adv, y, loss)
                if labels is not None and not (going := logits.argmax(1) == labels[rows]).all():
                    result[rows[~going]] = x_adv[~going]
                    rows, x_adv, y, alpha, low, high, velocity, grad = (
                        t[going] for t in (rows, x_adv, y, alpha, low, high, velocity, grad))
                    if not len(rows):
                        return result
                if momentum is not None:
                    grad = grad / grad.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-30)
                    velocity = grad = momentum * velocity + grad
                x_adv = (x_adv + alpha * grad.sign()).clamp(low, high)
            result[rows] = x_adv = x_adv.clamp(low, high)
            if labels is not None and restarts > 1:
                with torch.no_grad():
                    rows = rows[model(x_adv).argmax(1) == labels[rows]]
                if not len(rows):
                    break
    return result


def uniform_start(x, eps, clip=True):
    """PGD's random start: uniform in the eps-ball, clipped to [0, 1] unless told otherwise."""
    start = x + eps * torch.empty_like(x).uniform_(-1, 1)
    return start.clamp(0, 1) if clip else start


def gaussian_start(x, eps):
    """TRADES's random start: x plus a Gaussian of deviation 0.001, clipped to [0, 1] (Zhang et al. 2019)."""
    return (x + 0.001 * torch.randn_like(x)).clamp(0, 1)


def fgsm(model, x, target, eps, **options):
    """x + eps sign(grad) (Goodfellow et al. 2015; SAT-Rx eq. 1)."""
    return linf_attack(model, x, target, eps, eps, 1, **options)


def rfgsm(model, x, target, eps, alpha, **options):
    """A step of alpha in a random sign direction, then one of eps - alpha along the gradient (SAT-Rx eqs. 2 and 3)."""
    def noise(x, eps):  # not clipped before the gradient, as printed; the result is
        return x + alpha * torch.randn_like(x).sign()
    return linf_attack(model, x, target, eps, eps - alpha, 1, start=noise, **options)


def ifgsm(model, x, target, eps, steps, **options):
    """Iterative FGSM with steps of eps / steps from x itself (SAT-Rx eqs. 4 and 5)."""
    return linf_attack(model, x, target, eps, eps / steps, steps, **options)


def pgd(model, x, target, eps, step, steps, start=uniform_start, **options):
    """Projected gradient descent, by default from a random start in the ball (Madry et al. 2018; SAT-Rx eqs. 7, 8)."""
    return linf_attack(model, x, target, eps, step, steps, start=start, **options)


def mi_fgsm(model, x, target, eps, steps, mu=1.0, **options):
    """Iterative FGSM with momentum over L1-normalised gradients (Dong et al. 2018; SAT-Rx eqs. 9 to 11)."""
    return linf_attack(model, x, target, eps, eps / steps, steps, momentum=mu, **options)


def dra(model, x, target, eps, steps, p, loss=cross_entropy, start=None, mode="eval"):
    """The dynamically regulated adversary (DRA, algorithm 1): T steps of eps / T along the gradient divided by its mean
    magnitude, then every value but the share p of largest gradient is put back; clipped to [0, 1].

    x: (N, C, H, W) in [0, 1]; eps: the mean change per value before the filter, a number or (N,). start: function
    (x, eps) -> first iterate, x itself by default. No projection; a gradient of zero moves nothing. Returns the
    perturbed images, detached.
    """
    x_adv, alpha = x.detach() if start is None else start(x.detach(), eps), per_sample(eps, x) / steps
    with model_mode(model, mode):
        for _ in range(steps):
            grad, _ = input_gradient(model, x_adv, target, loss)
            x_adv = x_adv + alpha * grad / grad.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-30)
    salience = grad.abs().flatten(1)
    kept = torch.zeros_like(salience, dtype=torch.bool)
    kept.scatter_(1, salience.topk(round(p * salience.shape[1]), dim=1).indices, True)
    return torch.where(kept.view_as(x), x_adv, x.detach()).clamp(0, 1)


def pixel_scale(dataset):
    """By what a radius in units of normalised images is multiplied to be in [0, 1] units: the mean deviation."""
    std = DATASETS[dataset]["std"]
    return sum(std) / len(std)


def correct(model, split, batch_size=None, attack=None):
    """Which images of a split the model, in eval mode, classifies correctly: bool (N,) on the split's device.

    batch_size: as in `eval_batches`. attack: function (x, y) -> perturbed images; None for clean accuracy.
    """
    flags = torch.empty(len(split.labels), dtype=torch.bool, device=split.labels.device)
    with model_mode(model, "eval"):
        for x, y, rows in eval_batches(split, batch_size):
            x = x if attack is None else attack(x, y)
            with torch.no_grad():
                flags[rows] = model(x).argmax(1) == y
    return flags


def accuracy(model, split, batch_size=None, attack=None):
    """The share of a split that the model, in eval mode, classifies correctly; the rest as in `correct`."""
    return correct(model, split, batch_size, attack).float().mean().item()


# ----------------------------------------------------------------------------------------------- runs and checkpoints

FORMAT = 1  # of the checkpoint's dictionary; raise it when a field changes its meaning


def write_beside(path, write):
    """Call write(file) on PATH.PID.part and rename it to PATH: a reader, or a crash, never sees half a file."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})")
    finally:
        part.unlink(missing_ok=True)


def load_file(path):
    """A file of torch.save with tensors and plain values only, onto the CPU; UsageError for anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})")
    except Exception as error:
        code = re.search("unsupported (global|class)", str(error), re.IGNORECASE)
        raise UsageError(f"{path}: " + ("refused: loading it would run code, save its state_dict instead" if code
                                        else f"not a checkpoint, or a damaged one ({type(error).__name__})"))


def load_checkpoint(path):
    """The dictionary that training wrote to `path`, checked to be one."""
    checkpoint = load_file(path)
    needed = {"format", "script", "model", "dataset", "normalize", "args", "provenance", "history", "best", "last"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise UsageError(f"{path}: not a checkpoint of a run")
    if checkpoint["format"] != FORMAT:
        raise UsageError(f"{path}: has format {checkpoint['format']}, this code reads {FORMAT}")
    if checkpoint["dataset"] not in DATASETS or checkpoint["normalize"] not in ("none", "dataset", "image"):
        raise UsageError(f"{path}: names a data set or a normalisation that this code does not have")
    return checkpoint


def load_init(model, path):
    """Load the last weights of a checkpoint (the best, where it holds no others) into a model; returns the former."""
    checkpoint = load_checkpoint(path)
    if checkpoint["normalize"] != model.normalize:
        raise UsageError(f"{path}: its network has --normalize {checkpoint['normalize']}, this one {model.normalize}")
    load_weights(model, (checkpoint["last"] or checkpoint["best"])["state_dict"], path)
    return checkpoint


def load_weights(model, state_dict, path):
    """Strictly load a backbone's state_dict, also one saved through DDP or torch.compile; UsageError if it differs."""
    state_dict = {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in state_dict.items()}
    try:
        model.net.load_state_dict(state_dict)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UsageError(f"{path}: its weights do not fit the model ({str(error).splitlines()[-1].strip()})")


def load_model(path, weights="best", device="cpu", dataset=None, architecture=None):
    """(Classifier in eval mode with the `best` or `last` weights, checkpoint dictionary) of a run's file; UsageError
    where it was trained on another data set than `dataset`.

    architecture: the command line's --model, needed where the network is built by the user's own file: a checkpoint
    that names code is not followed.
    """
    checkpoint = load_checkpoint(path)
    if dataset not in (None, checkpoint["dataset"]):
        raise UsageError(f"{path}: was trained on {checkpoint['dataset']}, not on {dataset}")
    if not checkpoint.get(weights):
        raise UsageError(f"{path}: holds no {weights} weights")
    if ".py:" in checkpoint["model"] and not architecture:
        raise UsageError(f"{path}: {checkpoint['model']} builds its network and is not run unasked: give --model")
    model = build_model(architecture or checkpoint["model"], checkpoint["dataset"], checkpoint["normalize"], device)
    load_weights(model, checkpoint[weights]["state_dict"], path)
    return model.eval(), checkpoint


def provenance(device):
    """What a number needs beside it: command, commit, hardware and versions, as plain values."""
    try:
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    gpu, size = device.type == "cuda", ranks()[1]
    start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")] if size > 1 else ["python"]
    return dict(command=shlex.join([*start, Path(sys.argv[0]).name, *sys.argv[1:]]), commit=commit,
                hardware=(f"{size} x " if size > 1 else "") +
                (torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"),
                versions=dict(python=sys.version.split()[0], torch=str(torch.__version__), numpy=np.__version__))


class Meter:
    """Sample-weighted means of named scalars. They gather on the device and are read every 50 steps, when a value that
    is not finite ends the run (UsageError) with epoch, step and term named."""

    def __init__(self, epoch):
        self.epoch, self.step, self.rows, self.sizes, self.total, self.n = epoch, 0, [], [], 0, 0

    def add(self, size, terms):
        """terms: name -> scalar tensor, a mean over `size` samples."""
        self.names = list(terms)
        self.rows.append(torch.stack([term.detach().float() for term in terms.values()]))
        self.sizes.append(size)
        if len(self.rows) == 50:
            self.read()

    def read(self):
        """Check and sum what has gathered; returns name -> mean so far."""
        if self.rows:
            rows, sizes = torch.stack(self.rows).cpu().double(), torch.tensor(self.sizes, dtype=torch.float64)
            for step, term in (~rows.isfinite()).nonzero():
                raise UsageError(f"{self.names[term]} is {rows[step, term]:.0f} at epoch {self.epoch + 1}, step "
                                 f"{self.step + step + 1}: the run ends, what was saved before is kept (a lower --lr?)")
            self.total, self.n = self.total + sizes @ rows, self.n + sizes.sum()
            self.step, self.rows, self.sizes = self.step + len(rows), [], []
        return dict(zip(self.names, (self.total / self.n).tolist()))


def default_path(script, dataset):
    """Where a run is written without --ckpt."""
    return f"runs/{script}-{dataset}-{time.strftime('%Y%m%d-%H%M%S')}.pt"


def going_on(path, resume):
    """Whether --resume finds a run to go on with."""
    return resume and Path(path).with_suffix(".resume.pt").exists()


def claim(path, resume, overwrite):
    """The open PATH.lock that keeps a second run off `path` until it is closed; UsageError where the name is not valid,
    another run holds it, or files are there that the flags do not give free.

    --overwrite takes the resume file away at once: were the new run interrupted, --resume must not revive the old.
    """
    path, resume_path = Path(path), Path(path).with_suffix(".resume.pt")
    if path.suffix != ".pt":
        raise UsageError(f"--ckpt {path}: the name must end in .pt")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(f"{path}.lock", "w")
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"--ckpt {path}: another run is writing it")
    except OSError as error:
        raise UsageError(f"--ckpt {path}: cannot be written ({error.strerror})")
    exists = any(file.exists() for file in (path, resume_path, path.with_suffix(".jsonl")))
    if exists and not overwrite and not going_on(path, resume):
        go_on = "--resume goes on with it, " if resume_path.exists() else ""
        raise UsageError(f"{path} exists, or its .jsonl: {go_on}--overwrite replaces it")
    if overwrite:
        resume_path.unlink(missing_ok=True)
    return lock


class Run:
    """A training run on disk and in W&B: PATH.pt to use, PATH.resume.pt to go on from, PATH.jsonl, a line per epoch.
    Under torchrun the first process writes, and all of them read what an interrupted run left."""

    FREE = ("ckpt", "resume", "overwrite", "data_dir", "device", "workers", "wandb")  # what a resumed run may change

    def __init__(self, script, config, device):
        """script: its name; config: its resolved flags, plain values. UsageError where the path cannot be used."""
        self.script, self.config = script, config
        self.path = Path(config["ckpt"] or default_path(script, config["dataset"]))
        self.resume_path, self.log_path = (self.path.with_suffix(end) for end in (".resume.pt", ".jsonl"))
        self.provenance, self.history, self.best, self.wandb_id = provenance(device), [], None, None
        self.method_state, self.columns = None, None  # what an interrupted run's method kept; what was printed last
        self.writes = ranks()[0] == 0
        self.lock = claim(self.path, config["resume"], config["overwrite"]) if self.writes else None
        self.state = load_file(self.resume_path) if going_on(self.path, config["resume"]) else None
        if self.state:
            self.adopt(self.state)
        for name, value in dict(config, ckpt=str(self.path)).items():
            print(f"{name.replace('_', '-'):>14}  {value}")
        self.wandb = wandb_run(config, script, self.path, self.wandb_id) if self.writes else None

    def adopt(self, state):
        """Take over an interrupted run's history, after checking that it is this run."""
        try:
            old, new = dict(state["args"], script=state["script"]), dict(self.config, script=self.script)
            self.history, self.best, self.wandb_id = state["history"], state["best"], state["wandb_id"]
            self.method_state = state["method_state"]
            self.provenance = state["provenance"]  # of the command that started the run
        except (KeyError, TypeError):
            raise UsageError(f"{self.resume_path}: is not what an interrupted run leaves")
        differ = [f"{k.replace('_', '-')} was {old.get(k)}, is {new[k]}" for k in new
                  if k not in self.FREE and (k not in old or old[k] != new[k])]
        if differ:
            raise UsageError(f"{self.resume_path} is of a run with other flags: {'; '.join(differ)}")

    def restore(self, model, optimizer):
        """Load the interrupted run, if there is one, into model and optimizer, or else the network of --init; returns
        the next epoch, from 0."""
        if not self.state:
            if self.config["init"]:
                load_init(model, self.config["init"])
            return 0
        load_weights(model, self.state["last"]["state_dict"], self.resume_path)
        optimizer.load_state_dict(self.state["optimizer"])
        if self.writes and not self.path.exists():
            saved = {name: value for name, value in self.state.items() if name != "optimizer"}
            write_beside(self.path, lambda file: torch.save(saved, file))
        epoch, self.state = self.state["last"]["epoch"], None
        print(f"{self.path}: " + (f"goes on after epoch {epoch}" if epoch < self.config["epochs"] else "is finished"))
        return epoch

    def finish_epoch(self, model, optimizer, row, metric=None, method_state=None):
        """Keep the best weights (highest `metric`; the last where it is None), save, log and print an epoch.

        row: name -> number, with "epoch" counted from 1. run.resume.pt alone suffices to go on; it is written last.
        """
        self.history.append(row)
        state = {name: value.detach().cpu().clone() for name, value in model.net.state_dict().items()}
        if not all(value.isfinite().all() for value in state.values()):
            raise UsageError(f"weights are no longer finite after epoch {row['epoch']}: the run ends, what was saved "
                             "before is kept (a lower --lr?)")
        last = dict(epoch=row["epoch"], state_dict=state)
        if metric is None or self.best is None or metric > self.best["metric"]:
            self.best = dict(last, metric=metric)
        if not self.writes:
            return
        config, facts = self.config, DATASETS[self.config["dataset"]]
        saved = dict(format=FORMAT, script=self.script, model=config["model"], dataset=config["dataset"],
                     num_classes=facts["classes"], input_shape=facts["shape"], normalize=config["normalize"],
                     args=config, provenance=self.provenance, history=self.history, method_state=method_state,
                     wandb_id=self.wandb.id if self.wandb else self.wandb_id, best=self.best, last=last)
        write_beside(self.path, lambda file: torch.save(saved, file))
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_beside(self.log_path, lambda file: file.write(lines.encode()))
        write_beside(self.resume_path, lambda file: torch.save(dict(saved, optimizer=optimizer.state_dict()), file))
        try:
            if self.wandb:
                self.wandb.log(row)
        except Exception as error:
            print(f"W&B failed, logging to local files only: {error}")
            self.wandb = None
        print_row(row, config["epochs"], header=row["epoch"] % 10 == 1 or list(row) != self.columns)
        self.columns = list(row)

    def close(self):
        """End the W&B run and release the path."""
        if self.wandb:
            self.wandb.finish()
        if self.lock:
            self.lock.close()
        print(f"{self.path}: the best epoch is {self.best['epoch']}; python evaluate.py --ckpt {self.path}")


def print_row(row, epochs, header):
    """One aligned line for an epoch, below a header, where asked for, of what follows the slash in each name."""
    names = [name.split("/")[-1] for name in row]
    cells = [f"{value}/{epochs}" if name == "epoch" else f"{value:.4g}" for name, value in row.items()]
    for line in (names, cells) if header else (cells,):
        print(" ".join(f"{cell:>{max(8, len(name))}}" for name, cell in zip(names, line)), flush=True)


def wandb_run(config, script, path, run_id=None):
    """A W&B run, or None; it never asks and never stops a run: what fails costs one line and continues offline."""
    mode = os.environ.get("WANDB_MODE") or config["wandb"]
    if mode == "disabled":
        return None
    try:
        import wandb
    except Exception as error:
        print(f"wandb is not installed, logging to local files only ({error})")
        return None
    if mode in ("auto", "online"):
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        try:
            key = os.environ.get("WANDB_API_KEY") or netrc(os.environ.get("NETRC")).authenticators(host)
        except (OSError, NetrcParseError):
            key = None
        if mode == "online" and not key:
            print("W&B: no key is configured (wandb login), logging offline")
        mode = "online" if key else "offline"
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            run = wandb.init(project="cleanat", name=f"{script}-{path.stem}", config=config, id=run_id, resume="allow",
                             mode=attempt, dir=path.parent, settings=wandb.Settings(silent=True, init_timeout=20))
            run.define_metric("epoch")
            run.define_metric("*", step_metric="epoch")
            return run
        except Exception as error:
            print(f"W&B {attempt} failed: {(str(error) or type(error).__name__).splitlines()[0]}")
