"""CleanAT's shared module: what must not drift between methods.

Flags, set-up, data, backbones, attacks, checkpoints. Conventions:
- Images are float32 in [0, 1], (N, C, H, W). Labels are int64, (N,).
- A model maps images to float32 logits, (N, classes).
- eps and step sizes are in [0, 1] units: a number, or a tensor with one value per image.
- A loss that is given to an attack is per image: loss(logits, target) -> (N,).
- Randomness is a pure function of (seed, stream, epoch, step).
"""

import argparse
import contextlib
import difflib
import errno
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import time
import types
import warnings
import weakref
import zipfile
from fractions import Fraction
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: runs work, but two runs on one path are not kept apart
    fcntl = None

# The data sets that are known by name. eps: the usual L-infinity radius. step: PGD's usual step.
# images: how many training images there are. mean, std: of the pixels, one value per channel.
DIGITS = dict(classes=10, shape=(1, 28, 28), images=1437, eps=0.1, step=0.02,
              mean=(0.307,), std=(0.314,))
MNIST = dict(classes=10, shape=(1, 28, 28), images=60_000, eps=0.3, step=0.01,
             mean=(0.1307,), std=(0.3081,))
CIFAR10 = dict(classes=10, shape=(3, 32, 32), images=50_000, eps=8 / 255, step=2 / 255,
               mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
CIFAR100 = dict(classes=100, shape=(3, 32, 32), images=50_000, eps=8 / 255, step=2 / 255,
                mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762))
TINYIMAGENET = dict(classes=200, shape=(3, 64, 64), images=100_000, eps=8 / 255, step=2 / 255,
                    mean=(0.4802, 0.4481, 0.3975), std=(0.2770, 0.2691, 0.2821))
IMAGENET = dict(classes=1000, shape=(3, 224, 224), images=1_281_167, eps=16 / 255, step=1 / 255,
                mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
IMAGENET100 = dict(IMAGENET, classes=100, images=128_000, eps=8 / 255, step=2 / 255)
DATASETS = {"digits": DIGITS, "mnist": MNIST, "cifar10": CIFAR10, "cifar100": CIFAR100,
            "tinyimagenet": TINYIMAGENET, "imagenet": IMAGENET, "imagenet100": IMAGENET100}

IMAGE_FILES = ("imagenet", "imagenet100")  # read from files; the others are held in memory
NORMALIZATIONS = ("none", "dataset", "image")
SCHEDULES = ("paper", "onecycle")
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"]).resolve()
AUGMENTATIONS = ("none", "crop", "crop-flip", "reflect-flip")


# ---------------------------------------------------------------------------------------- errors

class UsageError(Exception):
    """Something the user can put right. `cli` prints it in one line, without a traceback."""


begun_runs = []  # paths of this process's runs; the first one is that of --ckpt
saved_files = []  # what this process has saved so far


def what_is_kept():
    """The end of a message about a run that stops."""
    return f", {saved_files[-1]} is kept" if saved_files else ""


def cli(main):
    """Run a script's main(). A user's mistake ends in one line with status 2, Ctrl-C with 130."""
    try:
        main()
        if ranks()[1] > 1:  # on an error torchrun kills the other ranks; waiting here would hang
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except UsageError as error:
        # Most mistakes are seen by all: when the first process has told, torchrun ends the others.
        if ranks()[0]:
            time.sleep(5)
        if ranks()[0] == 0 or torch.distributed.is_initialized():
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        message = "interrupted"
        if saved_files:
            message += (f": {saved_files[-1]} is kept, the same command with "
                        f"--ckpt {begun_runs[0]} --resume goes on")
        print(f"\n{message}", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        print(f"error: out of memory, try a smaller --batch-size ({reason})", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def did_you_mean(word, known):
    """", did you mean NAME?" for the nearest known name, or "" where none is near."""
    near = [name for name in known if name.lower() == word.lower()]
    near += [name for name in known if word.startswith(name) or name.startswith(word)]
    near += difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


# ----------------------------------------------------------------------------------------- flags

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest name. --batch_size is --batch-size."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False,
                         usage="python %(prog)s [--flag value ...]",
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([with_dashes(str(word)) for word in words], namespace)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = ["--" + name.replace("_", "-") for name in vars(parsed)]
            word = unknown[0].partition("=")[0]
            self.error(f"{word} is no flag{did_you_mean(word, flags)}")
        return parsed

    def print_help_of(self, flags):
        """Print the help, which says whose defaults it shows, and leave."""
        self.description = (f"In brackets: defaults for --dataset {flags.dataset} --method "
                            f"{flags.method}. Add other flags to see theirs.\n\n"
                            f"{self.description}")
        self.print_help()
        sys.exit(0)

    def error(self, message):
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice:
            message += did_you_mean(choice[1], re.findall(r"[\w+.-]+", choice[2]))
        raise UsageError(f"{message} (--help lists the flags)")


def with_dashes(word):
    """A word of the command line. In the name of a flag underscores become dashes."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def number(low, high=math.inf, kind=float, above=False):
    """An argparse type: a number in [low, high], or in (low, high] if `above`. 2.5/255 is one."""
    def parse(text):
        try:
            value = int(text) if kind is int else quotient(text)
        except (ValueError, ZeroDivisionError, OverflowError):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}")
        if not low <= value <= high or (above and value == low):
            bounds = f"above {low}" if above else f"at least {low}"
            if high < math.inf:
                bounds += f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value
    return parse


def quotient(text):
    """The number that a text such as 8/255, 0.031 or 1e-3 stands for."""
    if "/" not in text:
        return float(Fraction(text))
    top, bottom = text.split("/")
    return float(Fraction(top) / Fraction(bottom))


unit = number(0, 1, above=True)  # eps and step sizes: in [0, 1] units, 0 < eps <= 1
count = number(1, kind=int)
natural = number(0, kind=int)


def several(low, high=math.inf, least=1):
    """An argparse type: `least` or more whole numbers in [low, high], as in 0,1,6; a list."""
    one = number(low, high, kind=int)

    def parse(text):
        numbers = [one(word) for word in text.split(",")]
        if len(numbers) < least or len(set(numbers)) < len(numbers):
            raise argparse.ArgumentTypeError(f"{text!r} must name {least} or more, each once")
        return numbers
    return parse


def shown(value):
    """A value as messages and help show it: 8/255 rather than 0.031372549, 0.9 for 3 * 0.3."""
    if isinstance(value, list):
        return ",".join(str(shown(item)) for item in value)
    if not isinstance(value, float):
        return value
    decimal = f"{value:.4g}"
    if math.isclose(float(decimal), value, rel_tol=1e-9):
        return decimal
    exact = [f"{round(255 * value, 2):g}/255", str(Fraction(value).limit_denominator(9))]
    exact = [text for text in exact if math.isclose(quotient(text), value, rel_tol=1e-9)]
    return min(exact, key=len, default=decimal)


def in_unit_of(value, flag):
    """A radius as text, in the unit in which `shown` gives that of a flag: 0.0251 or 6.4/255."""
    if str(shown(flag)).endswith("/255"):
        return f"{255 * value:.3g}/255"
    return f"{value:.4g}"


def shared_flags(parser, dataset, notes=None):
    """The flags that every training script has, in groups. dataset: the default one.

    A flag without a default here takes the paper's value for the data set: see `parse_flags`.
    notes: flag's name -> what the help of this script adds: of epochs, schedule and eps.
    """
    data_flags(parser.add_argument_group("data and network").add_argument, dataset)
    training_flags(parser.add_argument_group("training").add_argument, notes or {})
    run_flags(parser.add_argument_group("run").add_argument)


def data_flags(flag, dataset):
    """The shared flags on data and network. flag: the add_argument of a group."""
    flag("--dataset", default=dataset, help=f"{', '.join(DATASETS)}, or NAME for your own "
         "{data-dir}/NAME.npz (%(default)s)")
    flag("--data-dir", default="data", help="folder that holds NAME.npz, or ImageNet's images as "
         "imagenet/train/CLASS/NAME.JPEG and imagenet/val, or tiny-imagenet-200 (%(default)s)")
    flag("--classes", type=several(0, least=2), help="train on these classes only, as in 0,1,6 "
         "(all)")
    flag("--limit", type=count, help="train and validate on a fixed random subset of N images "
         "(all)")
    flag("--val", type=natural, help="training images kept for validation; 0: none. By default "
         "the paper's number, and at most a tenth of the images (%(default)s)")
    flag("--augment", choices=AUGMENTATIONS, help="of training images: crop after padding by 4, "
         "flip left to right; reflect pads with the image's own border (%(default)s)")
    flag("--model", help=f"backbone: {BACKBONES} (%(default)s)")
    flag("--normalize", choices=NORMALIZATIONS, help="a layer inside the model: by the data set's "
         "mean and deviation, or image by image (%(default)s)")
    flag("--init", metavar="CKPT", help="start from the last weights of this checkpoint")


def training_flags(flag, notes):
    """The shared flags on training. flag: the add_argument of a group; notes: see shared_flags."""
    added = {name: f"; {notes[name]}" if name in notes else ""
             for name in ("epochs", "schedule", "eps")}
    flag("--epochs", type=count, help=f"training epochs{added['epochs']} (%(default)s)")
    flag("--batch-size", metavar="N", type=count, help="images per step (%(default)s)")
    flag("--lr", type=number(0, above=True), help="learning rate of SGD, its highest (%(default)s)")
    flag("--schedule", choices=SCHEDULES, default="paper", help="of the learning rate"
         f"{added['schedule']}; onecycle: up for 30 %% of the steps, then down to 0, both linear "
         "(%(default)s)")
    flag("--weight-decay", type=number(0), help="weight decay of SGD (%(default)s)")
    flag("--momentum", type=number(0, 1), help="momentum of SGD (%(default)s)")
    flag("--eps", type=unit, help="radius of the adversary in [0, 1] units, as 8/255 or 0.031"
         f"{added['eps']} (%(default)s)")
    flag("--attack-mode", choices=["eval", "train"], default="eval", help="mode of BatchNorm and "
         "dropout while a training attack runs (%(default)s)")
    flag("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help="of "
         "training; auto: bfloat16 where the hardware computes in it (%(default)s)")
    flag("--tf32", action="store_true", help="let a GPU use TF32 where it computes in float32: "
         "faster, and coarser")
    flag("--seed", type=natural, default=0, help="seed of everything random but the choice of "
         "--val and --limit (%(default)s)")


def run_flags(flag):
    """The shared flags on files and machines. flag: the add_argument of a group."""
    flag("--ckpt", help="where to write the run (runs/SCRIPT-DATASET-TIME.pt)")
    flag("--resume", action="store_true", help="go on with the run at --ckpt; start it if there is "
         "none")
    flag("--overwrite", action="store_true", help="replace the run at --ckpt")
    flag("--keep-epochs", type=several(1), help="also keep the network after these epochs: 5,10 "
         "gives run.e5.pt and run.e10.pt beside run.pt (none)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    workers_flag(flag)
    wandb_flag(flag)


def workers_flag(flag):
    """Add --workers by `flag`, the add_argument of a parser or of a group."""
    flag("--workers", type=natural, default=4, help="processes that read image files, for each "
         "GPU; data sets that are held in memory need none (%(default)s)")


def wandb_flag(flag):
    """Add --wandb by `flag`, the add_argument of a parser or of a group."""
    flag("--wandb", choices=["auto", "online", "offline", "disabled"], default="auto",
         help="Weights & Biases; auto: online where a key is configured, else offline; the "
         "environment variable WANDB_MODE overrides it (%(default)s)")


def parse_flags(parser, argv, settings, losses, always=("eps",)):
    """(flags, facts, defaults, given) of a training script.

    flags: a Namespace. A flag that is not given has its default from `parser`, or else from
        settings(flags, facts), which sees None where neither has a value.
    facts: the data set's, see `dataset_facts`.
    defaults: name -> what the flag is where it is not given.
    given: the names of the flags that the command line itself gives, be it their default.
    losses: the script's dictionary, method -> lambda, or a list of them. A flag belongs to the
        methods whose lambda contains args.NAME; a function that the lambda calls is not searched.

    UsageError where a flag is given that belongs only to other methods, unless it is in `always`,
    or where a flag of this method has no value.
    """
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    asks_help = any(word in ("-h", "--help") for word in words)
    words = [word for word in words if word not in ("-h", "--help")]
    defaults = vars(parser.parse_args([]))
    given = given_flags(parser, words)

    flags = argparse.Namespace(**{**defaults, **given})
    facts = dataset_facts(flags.dataset, flags.data_dir, flags.classes)
    defaults.update(settings(flags, facts))
    if asks_help:
        parser.set_defaults(**defaults_told(settings, flags, facts, defaults, losses, always))
        parser.print_help_of(flags)
    check_paths(flags)
    refuse_unread(flags.method, given, losses, always)
    flags = argparse.Namespace(**{**defaults, **given})
    for name in sorted(flags_read(losses[flags.method]) & vars(flags).keys()):
        if getattr(flags, name) is None:
            raise UsageError(f"--method {flags.method} reads --{name.replace('_', '-')}, which "
                             f"has no default for it on {flags.dataset}: give the flag, or put "
                             "a value into PAPER")
    check_numbers(flags)
    return flags, facts, defaults, given.keys()


def check_numbers(flags):
    """UsageError where --batch-size or --keep-epochs cannot be had."""
    if flags.batch_size < ranks()[1]:
        raise UsageError(f"--batch-size {flags.batch_size} is for all {ranks()[1]} processes "
                         "together")
    last_kept = max(flags.keep_epochs or [0])
    if last_kept > flags.epochs:
        raise UsageError(f"--keep-epochs {last_kept}: the run has {flags.epochs} epochs")


def defaults_told(settings, flags, facts, defaults, losses, always):
    """name -> the default as help shows it, with the other methods' where it differs from theirs.

    Arguments as in `parse_flags`. A flag is told for the methods whose loss reads it.
    """
    tables = {}
    for method in losses:
        asked = argparse.Namespace(**{**vars(flags), "method": method})
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints was printed before
            tables[method] = settings(asked, facts)
    told = {}
    for name, value in defaults.items():
        readers = [method for method, loss in losses.items() if name in flags_read(loss)]
        if not readers or name in always:
            readers = list(losses)
        others = {}  # value -> methods
        for method in readers:
            other = tables[method].get(name, value)
            if other is not None and other != value:
                others.setdefault(shown(other), []).append(method)
        texts = [] if value is None else [str(shown(value))]
        texts += [f"{', '.join(methods)}: {other}" for other, methods in others.items()]
        told[name] = "; ".join(texts) or "none"
    return told


def method_lines(losses):
    """A line for each method of a script's dictionary of losses: its name and what it is.

    That is the first line of the docstring of the functions NAME_loss that it calls.
    """
    width = max(len(method) for method in losses)
    lines = []
    for method, loss in losses.items():
        parts = []
        for part in loss if isinstance(loss, list) else [loss]:
            called = [part.__globals__.get(name) for name in part.__code__.co_names
                      if name.endswith("_loss")]
            texts = [inspect.getdoc(function) for function in called if callable(function)]
            parts += [text.splitlines()[0].rstrip(".") for text in texts if text]
        lines.append(f"{method:<{width}}  {', then '.join(parts)}".rstrip())
    return "\n".join(lines)


def check_paths(flags):
    """UsageError where --ckpt, --resume and --overwrite contradict each other."""
    if flags.resume and flags.overwrite:
        raise UsageError("--resume continues a run and --overwrite replaces it: give one of them")
    if flags.resume and not flags.ckpt:
        raise UsageError("--resume needs --ckpt, the run to go on with")
    if flags.ckpt and not flags.ckpt.endswith(".pt"):
        raise UsageError(f"--ckpt {flags.ckpt}: the name must end in .pt")
    if flags.ckpt and flags.ckpt.endswith(".resume.pt"):
        raise UsageError(f"--ckpt {flags.ckpt}: give the run's own name, without .resume")


def given_flags(parser, argv):
    """name -> value of the flags that the command line itself gives, be it their default."""
    not_given = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    found = vars(parser.parse_args(argv, not_given))
    return {name: value for name, value in found.items() if value is not None}


def flags_read(losses):
    """The names that a line of the dictionary of losses mentions: NAME where it has args.NAME.

    losses: a function, or several in a list.
    """
    several = losses if isinstance(losses, list) else [losses]
    return {name for loss in several for name in loss.__code__.co_names}


def refuse_unread(method, given, losses, always):
    """UsageError where a flag was given that other methods' losses read and this one's does not."""
    read_by = {name: [other for other, loss in losses.items() if name in flags_read(loss)]
               for name in given}
    for name, methods in read_by.items():
        if methods and method not in methods and name not in always:
            raise UsageError(f"--method {method} has no use for --{name.replace('_', '-')}: that "
                             f"is for {', '.join(methods)}")


def table_settings(tables, flags, facts, with_eps=()):
    """The paper's settings for the data set and the method: name -> value.

    tables: data set -> its settings. A value that is a dictionary has one value per method, with
    "else" for the others. Another data set takes the settings of MNIST where it is grey, and of
    CIFAR-10 where it is coloured. with_eps: names of values that follow --eps in proportion.
    val is at most a tenth of the training images.
    """
    name = facts["name"]
    if name in IMAGE_FILES and name not in tables:
        raise UsageError(f"this script has no settings for {name}: choose {', '.join(tables)}")
    like = name if name in tables else facts["like"]
    table = {key: value.get(flags.method, value.get("else")) if isinstance(value, dict) else value
             for key, value in tables[like].items()}
    if name not in DATASETS and not flags.eps:
        raise UsageError(f"--dataset {name} needs --eps, the radius of the adversary")
    if flags.eps:
        ratio = flags.eps / table["eps"]
        for key in with_eps:
            if table.get(key) is not None:
                table[key] = min(1.0, ratio * table[key])
    table["val"] = min(table["val"], facts["images"] // 10)
    if like != name and ranks()[0] == 0:
        print(f"{name}: the script takes the settings of {like}")
    return table


# ---------------------------------------------------------------------------------------- set-up

def ranks():
    """(number of this process, how many there are) under torchrun; (0, 1) without."""
    if "LOCAL_RANK" not in os.environ:  # a cluster's scheduler may set the others
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def set_up(device="auto", precision="auto", parallel=True, tf32=False):
    """(torch.device, "float32" or "bfloat16"), with auto resolved.

    Under torchrun the processes are joined here: each gets the GPU of its number, and only the
    first prints. parallel: whether the script can run as several processes, as those that train.
    tf32: whether a GPU may round what float32 convolutions and products take to 10 bits.
    """
    rank, size = ranks()
    if size > 1 and not parallel:
        raise UsageError("this script runs as one process: use python instead of torchrun")
    device = open_device(device)
    if tf32 and device.type != "cuda":
        raise UsageError(f"--tf32 is for NVIDIA GPUs, the device is {device}")
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = parallel  # pays where batches have one size: in training
    if precision == "auto":
        precision = "bfloat16" if computes_in_bfloat16(device) else "float32"
    if size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")
    return device, precision


def open_device(name):
    """The torch.device of a name or of "auto"; UsageError where it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            if ranks()[1] > 1:
                device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            if device.index is not None:
                torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, AttributeError, ValueError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}")
    return device


def computes_in_bfloat16(device):
    """The rule of --precision auto: by the processor alone, nothing is tried out.

    bfloat16 on a GPU that has it, and on a CPU with AMX or AVX512-BF16; elsewhere it is emulated
    and slow. Network and batch do not matter where we measured, with AVX512-BF16 and one thread: a
    step of PGD training is 1.5 to 2.3 times faster with LeNet+, WRN-16-2 and ResNet-18 at batches
    of 8 to 128; with cnn-small 1.2 to 1.3 times at 32 and 128, and as fast as float32 at 8.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):  # the CPU's, or as told
        return False
    tests = [getattr(torch.cpu, name, None)
             for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return any(test() for test in tests if test)


def autocast(device, precision):
    """The context of a training step: bfloat16 autocast, or nothing in float32.

    Logits and losses stay in float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def seed_stream(seed, stream, epoch=0, step=0):
    """Seed torch by a pure function of the arguments: a resumed run needs no random state."""
    key = (int.from_bytes(stream.encode(), "little"), epoch, step)
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def one_cycle(done):
    """The share of the highest learning rate after the share `done` of all steps, both in [0, 1].

    It rises to 1 over the first 30 % of the steps and falls to 0 over the rest, both linearly.
    """
    return done / 0.3 if done < 0.3 else (1 - done) / 0.7


def set_lr(optimizer, lr):
    """Give every group of parameters this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ------------------------------------------------------------------------------------- processes

# N processes under torchrun train as one would on the joint batch: `train_batches` gives the
# process of number r the rows r, r + N, r + 2N ... of each joint batch, random tensors are drawn
# for all of it, and `update` averages the gradients over its images. The functions below cost
# nothing where there is one process.

joint = SimpleNamespace(images=None)  # of the step that `train_batches` is at, else None


def summed(values):
    """A tensor's sum over the processes of torchrun; itself where there is one process."""
    if ranks()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def joint_size(x):
    """How many images all processes together have in this step; len(x) outside of training."""
    return joint.images if ranks()[1] > 1 and joint.images else len(x)


def own_rows():
    """The slice of the joint batch that this process has."""
    rank, size = ranks()
    return slice(rank, None, size) if size > 1 and joint.images else slice(None)


def rows_below(n):
    """How many of the first n rows of the joint batch are this process's; n for one process."""
    return len(range(n)[own_rows()])


def joint_mean(mean, x):
    """The mean over the joint batch of `mean`, a scalar without gradient over the images x."""
    if joint_size(x) == len(x):
        return mean
    return summed(mean * (len(x) / joint.images))


def joint_sum(values, x):
    """A term of the loss that is a sum over the joint batch, not a mean; `values` are of x."""
    return values.sum() * (joint_size(x) / len(x))


def joint_batch(x):
    """The rows of all processes, in the order of the joint batch; without a gradient."""
    if joint_size(x) == len(x):
        return x
    whole = x.new_zeros((joint.images, *x.shape[1:]))
    whole[own_rows()] = x
    return summed(whole)


def drawn_like(x, fill):
    """A random tensor as x. fill: a function that fills a tensor in place and returns it."""
    if joint_size(x) == len(x):
        return fill(torch.empty_like(x))
    whole = torch.empty_like(x[:1]).repeat(joint.images, *[1] * (x.dim() - 1))
    if x.dim() == 4:
        whole = whole.contiguous(memory_format=torch.channels_last)
    return fill(whole)[own_rows()]


def uniform_like(x):
    """Uniform in [-1, 1], as x."""
    return drawn_like(x, lambda values: values.uniform_(-1, 1))


def normal_like(x):
    """Standard normal, as x."""
    return drawn_like(x, lambda values: values.normal_())


@contextlib.contextmanager
def first_process_first():
    """What is in the block is done by the first process, and then by the others."""
    rank, size = ranks()
    joined = size > 1 and torch.distributed.is_initialized()
    if joined and rank:
        torch.distributed.barrier()
    yield
    if joined and not rank:
        torch.distributed.barrier()


def update(optimizer, loss, images):
    """One step of the optimiser: gradients of the loss, their mean over all processes, the step.

    loss: a scalar, a mean over `images` images of this process.
    """
    optimizer.zero_grad()
    loss.backward()
    if ranks()[1] > 1:
        average_gradients(optimizer, images)
    optimizer.step()


def average_gradients(optimizer, images):
    """Each gradient becomes the mean over the images of all processes; `images` are this one's."""
    grads = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]
             if parameter.grad is not None]
    flat = torch.cat([images * grad.flatten() for grad in grads] + [grads[0].new_tensor([images])])
    flat = summed(flat)
    means = (flat[:-1] / flat[-1]).split([grad.numel() for grad in grads])
    for grad, mean in zip(grads, means):
        grad.copy_(mean.view_as(grad))


def average_buffers(net):
    """BatchNorm's running statistics become their mean over the processes."""
    if ranks()[1] == 1:
        return
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.copy_(summed(buffer.clone()) / ranks()[1])


# ------------------------------------------------------------------------------------------ data

class Split(NamedTuple):
    """Part of a data set, on the device.

    images: uint8 (N, C, H, W), or an ImageFiles. labels: (N,). index: (N,), each image's position
    in the whole training or test set.
    """
    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor

    def take(self, rows):
        return Split(self.images[rows], self.labels[rows], self.index[rows])


def dataset_facts(name, data_dir="data", chosen=None):
    """What is known of a data set: a dictionary as in DATASETS, with three more entries.

    name: that of DATASETS, or that of the user's own {data_dir}/{name}.npz, whose arrays
    train_images (uint8, (N, H, W) or (N, H, W, C)) and train_labels (whole numbers from 0) say
    the rest. chosen: the classes to keep, numbered anew in this order, or None for all of them.
    The additional entries: name, chosen, and like, the known data set of the same kind.
    UsageError where there is no such data set, or no such class.
    """
    if name in DATASETS:
        facts = dict(DATASETS[name])
    else:
        facts = own_facts(name, data_dir, chosen)
    facts["name"] = name
    facts["chosen"] = chosen
    facts["like"] = "mnist" if facts["shape"][0] == 1 else "cifar10"
    if chosen:
        if max(chosen) >= facts["classes"]:
            raise UsageError(f"--classes: {name} has classes 0 to {facts['classes'] - 1}, not "
                             f"{max(chosen)}")
        if name in DATASETS:  # their classes have about the same number of images
            facts["images"] = facts["images"] * len(chosen) // facts["classes"]
        facts["classes"] = len(chosen)
    return facts


def own_facts(name, data_dir, chosen):
    """The entries of DATASETS for the user's own {data_dir}/{name}.npz.

    images counts those of the chosen classes; the other entries are of the whole data set. PGD's
    step is a quarter of eps: that of MNIST's papers is weak where few steps are taken.
    """
    path = Path(data_dir) / f"{name}.npz"
    if not path.exists():
        there = [file.stem for file in Path(data_dir).glob("*.npz")]
        raise UsageError(f"--dataset {name}: {path} is missing; known by name are "
                         f"{', '.join(DATASETS)}{did_you_mean(name, [*DATASETS, *there])}")
    images, labels = read_npz(path, "train")
    _, height, width, channels = images.shape
    classes = int(labels.max()) + 1
    if channels not in (1, 3):
        raise UsageError(f"{path}: images need 1 or 3 channels, not {channels}")
    if classes > len(labels):
        raise UsageError(f"{path}: labels must be 0, 1 and so on, each with a training image; the "
                         f"highest of {len(labels)} is {classes - 1}")
    counts = np.bincount(labels.astype(np.int64), minlength=classes)
    if classes < 2 or not counts.all():
        raise UsageError(f"{path}: labels must be 0, 1 and so on, two or more; without a training "
                         f"image is class {int(counts.argmin())}")
    mean, std = pixel_statistics(images)
    usual = MNIST if channels == 1 else CIFAR10
    in_use = counts if chosen is None else counts[[c for c in chosen if c < classes]]
    return dict(classes=classes, shape=(channels, height, width), images=int(in_use.sum()),
                eps=usual["eps"], step=usual["eps"] / 4, mean=mean, std=std)


def pixel_statistics(images):
    """(means, deviations) of the channels of uint8 images (N, H, W, C), of values in [0, 1]."""
    values = np.arange(256) / 255
    means = []
    deviations = []
    for channel in range(images.shape[3]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        mean = np.average(values, weights=counts)
        variance = np.average((values - mean) ** 2, weights=counts)
        means.append(float(mean))
        deviations.append(max(1e-3, float(variance ** 0.5)))  # images of one colour: not 0
    return tuple(means), tuple(deviations)


def checkpoint_facts(checkpoint):
    """The facts, as of `dataset_facts`, of the data set that a checkpoint was trained on.

    For the user's own data, images, eps and step are those of the known data set of the same kind.
    """
    channels, _, _ = checkpoint["input_shape"]
    like = "mnist" if channels == 1 else "cifar10"
    name = checkpoint["dataset"]
    facts = dict(DATASETS.get(name, DATASETS[like]), name=name, like=like)
    facts["classes"] = checkpoint["num_classes"]
    facts["shape"] = tuple(checkpoint["input_shape"])
    facts["chosen"] = checkpoint["args"].get("classes")
    for key in ("mean", "std"):
        facts[key] = checkpoint.get(key, facts[key])
    return facts


class ImageFiles(torch.utils.data.Dataset):
    """Image files in the place of a Split's tensor; they are cut to `shape` as they are read.

    draw: None for the middle of the image, or (seed, epoch) for torchvision's random crop and
    flip, a pure function of draw and position. resize: whether the image is made smaller before
    its middle is cut out.
    """

    def __init__(self, paths, shape, workers, draw=None, resize=True):
        """paths: array of bytes (N,); shape: (3, H, H); workers: how many processes read."""
        self.paths = paths
        self.workers = workers
        self.draw = draw
        self.resize = resize
        self.shape = (len(paths), *shape)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        """An image, uint8 (3, H, H), at a whole number; an ImageFiles at a tensor of them."""
        if torch.is_tensor(rows):
            return ImageFiles(self.paths[rows.cpu().numpy()], self.shape[1:], self.workers,
                              resize=self.resize)
        from PIL import Image
        transforms = import_torchvision().transforms
        size = self.shape[-1]
        if self.draw:
            seed, epoch = self.draw
            seed_stream(seed, "crop", epoch, rows)
            steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        elif self.resize:
            steps = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        else:
            steps = [transforms.CenterCrop(size)]
        steps.append(transforms.PILToTensor())
        try:
            with Image.open(os.fsdecode(self.paths[rows])) as image:
                return transforms.Compose(steps)(image.convert("RGB"))
        except Exception as error:
            raise UsageError(f"{os.fsdecode(self.paths[rows])} cannot be read ({error!r})")


def read(split, chunks, draw=None):
    """The images of a split at each tensor of positions in `chunks`, as models want them.

    They are float32 in [0, 1], channels_last, on the split's device. draw: (seed, epoch), where
    files are to be cropped and flipped at random.
    """
    if torch.is_tensor(split.images):
        for rows in chunks:
            yield to_float(split.images[rows])
        return
    files = ImageFiles(split.images.paths, split.images.shape[1:], split.images.workers, draw,
                       split.images.resize)
    device = split.labels.device
    loader = torch.utils.data.DataLoader(
        files, batch_sampler=[rows.tolist() for rows in chunks], num_workers=files.workers,
        pin_memory=device.type == "cuda")
    try:
        for images in loader:
            yield to_float(images.to(device, non_blocking=True))
    except UsageError as error:  # a process that reads sends its traceback along: keep its end
        raise UsageError(str(error).splitlines()[-1].split("UsageError: ")[-1])
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UsageError(f"a process that reads images ended ({error}): give the machine or the "
                         "container more shared memory, or use --workers 0")


def subset(n, size, seed=0):
    """A fixed random `size` of range(n), sorted; all of it where size is None.

    It does not depend on --seed.
    """
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]
    return rows.sort().values


def load_train(facts, data_dir, val, limit, device, workers=0):
    """(Split for training, Split for validation): a fixed choice of `val` training images.

    facts: of `dataset_facts`. limit: at most so many images in each, or None.
    """
    whole = load_split(facts, data_dir, "train", device, workers)
    n = len(whole.labels)
    if val >= n:
        raise UsageError(f"--val {val} leaves nothing of the {n} training images of "
                         f"{facts['name']}")
    held_out = torch.zeros(n, dtype=torch.bool)
    held_out[subset(n, val)] = True
    training = whole.take((~held_out).nonzero()[:, 0])
    validation = whole.take(held_out.nonzero()[:, 0])
    return training.take(subset(n - val, limit)), validation.take(subset(val, limit))


def load_split(facts, data_dir, split, device, workers=0):
    """The whole "train" or "test" Split of a data set; UsageError where that fails.

    Images come from {data_dir}/NAME.npz, or for ImageNet from files, which `workers` processes
    read: {data_dir}/imagenet/train/CLASS/*.JPEG and imagenet/val.
    """
    name = facts["name"]
    if name in IMAGE_FILES:
        folder = Path(data_dir) / "imagenet" / ("train" if split == "train" else "val")
        images, labels = image_folder(folder, name, facts["shape"], workers)
    else:
        images, labels = held_in_memory(facts, data_dir, split)
        images = images.to(device)
    if facts["chosen"]:
        images, labels = choose_classes(images, labels, facts["chosen"])
    return Split(images, labels.to(device), torch.arange(len(labels), device=device))


def held_in_memory(facts, data_dir, split):
    """(uint8 images (N, C, H, W), labels (N,)) of {data_dir}/NAME.npz, or of the digits."""
    name = facts["name"]
    if name == "digits":
        images, labels = digits(split)
    else:
        path = Path(data_dir) / f"{name}.npz"
        with first_process_first():
            if name in DATASETS and not path.exists():
                make = pack_tinyimagenet if name == "tinyimagenet" else download
                make(name, path)
        images, labels = read_npz(path, split)
        channels, height, width = facts["shape"]
        if images.shape[1:] != (height, width, channels):
            raise UsageError(f"{path}: {split}_images must have the shape (N, {height}, {width}, "
                             f"{channels})")
        known = np.isin(labels, range(facts["classes"])).all()
        if not facts["chosen"] and not known:
            raise UsageError(f"{path}: {split}_labels must be from 0 to {facts['classes'] - 1}")
    images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def read_npz(path, split):
    """(uint8 images (N, H, W, C), labels (N,), whole numbers) of one split of a .npz file."""
    try:
        with np.load(path) as arrays:  # lazy: training never reads the test images
            images = arrays[f"{split}_images"]
            labels = arrays[f"{split}_labels"]
    except Exception as error:
        raise UsageError(f"{path} cannot be read ({error!r}): it must hold the arrays "
                         f"{split}_images and {split}_labels")
    if images.ndim == 3 and path.stem not in DATASETS:  # grey images without an axis for it
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise UsageError(f"{path}: {split}_images must be uint8 of shape (N, H, W, C), not "
                         f"{images.dtype} {images.shape}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UsageError(f"{path}: {split}_labels must be whole numbers of shape "
                         f"({len(images)},), not {labels.dtype} {labels.shape}")
    if labels.min() < 0:  # --classes would take them for the highest class
        raise UsageError(f"{path}: {split}_labels must not be negative")
    return images, labels


def choose_classes(images, labels, chosen):
    """The images of the chosen classes; their labels are positions in `chosen`."""
    position = torch.full((max(int(labels.max()), *chosen) + 1,), -1)
    position[torch.tensor(chosen)] = torch.arange(len(chosen))
    rows = (position[labels] >= 0).nonzero()[:, 0]
    if not len(rows):
        raise UsageError("--classes: no image has one of these classes")
    return images[rows], position[labels[rows]]


def image_folder(folder, name, shape, workers):
    """(ImageFiles, labels) of a folder that holds a folder of images for each class of ImageNet.

    Classes are numbered by the order of their names. imagenet100 is a fixed random choice.
    """
    whole = DATASETS["imagenet"]["classes"]
    try:
        found = import_torchvision().datasets.ImageFolder(folder)
    except OSError as error:
        raise UsageError(f"{folder} must hold the images of https://image-net.org, unpacked and "
                         f"sorted into a folder for each class, as in "
                         f"{folder}/n01440764/NAME.JPEG ({error})")
    if len(found.classes) != whole:
        raise UsageError(f"{folder} holds {len(found.classes)} classes, ImageNet has {whole}")
    wanted = subset(whole, DATASETS[name]["classes"]).tolist()
    number_of = {class_of_all: i for i, class_of_all in enumerate(wanted)}
    samples = [(path, label) for path, label in found.samples if label in number_of]
    paths = np.array([os.fsencode(path) for path, _ in samples])
    labels = torch.tensor([number_of[label] for _, label in samples])
    return ImageFiles(paths, shape, workers), labels


def digits(split):
    """scikit-learn's 1,797 digits of 8x8 pixels, resized to 28x28; a fixed split of 1,437 / 360."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the data set 'digits' comes with scikit-learn: pip install scikit-learn")
    bunch = load_digits()
    small = torch.from_numpy(bunch.images / 16).float()[:, None]
    images = F.interpolate(small, size=(28, 28), mode="bilinear")
    images = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = np.random.default_rng(0).permutation(len(images))
    rows = rows[:1437] if split == "train" else rows[1437:]
    return images[rows], bunch.target[rows]


def download(name, path):
    """Write {name}.npz once from torchvision's download.

    It holds train_images, test_images (uint8, NHWC), train_labels and test_labels (int64).
    """
    class_name = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}[name]
    source = getattr(import_torchvision().datasets, class_name)
    print(f"{path} is missing: downloading {name}", flush=True)
    arrays = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            part = source(path.parent, train=split == "train", download=True)
            images = np.asarray(part.data)
            arrays[f"{split}_images"] = images if images.ndim == 4 else images[..., None]
            arrays[f"{split}_labels"] = np.asarray(part.targets, dtype=np.int64)
        write_beside(path, lambda file: np.savez(file, **arrays))
    except Exception as error:
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # where it is new, and so empty
        mirrors = getattr(source, "mirrors", None) or [getattr(source, "url", "")]
        raise UsageError(f"{path} is missing and {name} could not be downloaded from {mirrors[0]} "
                         f"({error}): put an npz there with train_images, test_images (uint8, "
                         "NHWC), train_labels, test_labels (int64)")


def pack_tinyimagenet(name, path):
    """Write {name}.npz once, as `download` does, from tiny-imagenet-200 beside it.

    That folder is the archive as downloaded. Classes are numbered by the order of their names. The
    test split is the archive's validation images, in the order of val_annotations.txt: the labels
    of its test images are not public. Grey images become RGB.
    """
    folder = path.parent / "tiny-imagenet-200"
    facts = DATASETS[name]
    print(f"{path} is missing: reading {folder}", flush=True)
    try:
        names = sorted((folder / "wnids.txt").read_text().split())
        train = [(file, label) for label, name in enumerate(names)
                 for file in sorted(folder.glob(f"train/{name}/images/*.JPEG"))]
        if (len(names), len(train)) != (facts["classes"], facts["images"]):
            raise OSError(f"it holds {len(names)} classes and {len(train)} training images, not "
                          f"{facts['classes']} and {facts['images']}")
        lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
        columns = [line.split("\t") for line in lines]
        test = [(folder / "val" / "images" / row[0], names.index(row[1])) for row in columns]
        arrays = {}
        for split, samples in dict(train=train, test=test).items():
            files, labels = zip(*samples)
            arrays[f"{split}_images"] = read_images(files, facts["shape"])
            arrays[f"{split}_labels"] = np.array(labels)
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path} is missing and {folder} cannot be read ({error}): unpack "
                         "http://cs231n.stanford.edu/tiny-imagenet-200.zip there, with wnids.txt, "
                         "train/WNID/images/*.JPEG, val/images/*.JPEG, val/val_annotations.txt")
    write_beside(path, lambda file: np.savez(file, **arrays))


def read_images(paths, shape):
    """uint8 (N, H, W, 3) of N image files; ValueError for one that has not the shape (3, H, W)."""
    from PIL import Image
    channels, height, width = shape
    images = np.empty((len(paths), height, width, channels), np.uint8)
    for row, path in enumerate(progress(paths, "reading images")):
        with Image.open(path) as image:
            if image.size != (width, height):
                raise ValueError(f"{path} has {image.size[0]} x {image.size[1]} pixels")
            images[row] = np.asarray(image.convert("RGB"))
    return images


def import_torchvision():
    """torchvision. Its wheel is built for CUDA: beside a CPU-only torch its import would fail."""
    try:
        import torchvision
    except ImportError:
        raise UsageError("torchvision is not installed: pip install torchvision")
    except RuntimeError:  # declare the two operators that it looks up; nothing here calls them
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)
        import torchvision
    return torchvision


def to_float(images):
    """uint8 images as the models want them: float32 in [0, 1], channels_last in memory."""
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


def progress(batches, name):
    """A progress bar over a sequence while standard error is a terminal."""
    return tqdm(batches, desc=name, leave=False, disable=True if ranks()[0] else None)


def eval_batches(split, batch_size=None, name="evaluating", shared=False):
    """(x, y, rows) over a split in order, with a progress bar; `rows` are positions in the split.

    batch_size: 500 by default, 50 where the images are files. shared: each process gets some of
    the batches, not all.
    """
    rank, size = ranks()
    if batch_size is None:
        batch_size = 500 if torch.is_tensor(split.images) else 50
    chunks = torch.arange(len(split.labels), device=split.labels.device).split(batch_size)
    if shared:
        chunks = chunks[rank::size]
    for rows, x in zip(progress(chunks, name), read(split, chunks)):
        yield x, split.labels[rows], rows


def joins_the_batch_before(leftover, batch_size):
    """Whether the last, smaller batch of an epoch is too small to be trained on alone.

    BatchNorm cannot normalise one image, and each process needs one.
    """
    smallest = max(2, ranks()[1])
    return 0 < leftover < min(smallest, batch_size)


def steps_per_epoch(images, batch_size):
    """How many batches `train_batches` makes of so many images."""
    whole, leftover = divmod(images, batch_size)
    if not leftover or (whole and joins_the_batch_before(leftover, batch_size)):
        return whole
    return whole + 1


def train_batches(split, batch_size, seed, epoch, augment="none", offset=0):
    """(x, y, index) over a shuffled split, with a progress bar.

    index: each image's position in the whole training set. augment: as --augment. torch is seeded
    for each step before anything is drawn from it. offset: added to the epoch in the seeds.
    batch_size: of all processes together; each gets its rows of every joint batch.
    """
    rank, size = ranks()
    seed_stream(seed, "order", offset + epoch)
    order = torch.randperm(len(split.labels)).to(split.labels.device)
    chunks = list(order.split(batch_size))
    if len(chunks) > 1 and joins_the_batch_before(len(chunks[-1]), batch_size):
        chunks[-2:] = [torch.cat(chunks[-2:])]
    if min(len(rows) for rows in chunks) < size:
        raise UsageError(f"{len(order)} training images are too few for {size} processes, or "
                         f"--batch-size {batch_size} is too small")
    joint_sizes = [len(rows) for rows in chunks]
    chunks = [rows[rank::size] for rows in chunks]
    images = read(split, chunks, (seed, offset + epoch))
    try:
        for step, (rows, x) in enumerate(zip(progress(chunks, f"epoch {epoch + 1}"), images)):
            seed_stream(seed, "step", offset + epoch, step)
            joint.images = joint_sizes[step]
            if augment != "none":
                x = crop_and_flip(x, augment)
            yield x, split.labels[rows], split.index[rows]
    finally:
        joint.images = None


def crop_and_flip(x, augment="crop-flip", pad=4):
    """A random crop after padding and, but for "crop", a random flip, per image; (N, C, H, W)."""
    n, _, height, width = x.shape
    shifts = torch.randint(0, 2 * pad + 1, (2, joint_size(x), 1, 1), device=x.device)
    top, left = shifts[:, own_rows()]
    rows = torch.arange(height, device=x.device)[None, :, None] + top
    columns = torch.arange(width, device=x.device).expand(n, 1, width)
    if augment != "crop":
        flipped = (torch.rand(joint_size(x), 1, 1, device=x.device) < 0.5)[own_rows()]
        columns = torch.where(flipped, columns.flip(2), columns)
    padding = "reflect" if augment == "reflect-flip" else "constant"
    padded = F.pad(x, [pad] * 4, padding).permute(0, 2, 3, 1)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, rows, columns + left].permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------- backbones

class Classifier(nn.Module):
    """A backbone as attacks and losses see it.

    It takes images in [0, 1], normalises inside, and returns float32 logits.
    """

    def __init__(self, net, normalize, mean, std, foreign=False):
        """mean, std: one number per channel. foreign: `net` is the user's own.

        A foreign network gets a copy of the images, in NCHW order in memory and in its own
        precision: it may use view(), change its input in place, or compute in half precision.
        Where its forward sets torch's seed, the random numbers of others go on as if it did not.
        """
        super().__init__()
        self.net = net
        self.sets_seed = False  # see `sets_seed`
        self.code = None  # the name in `own_code` of the user's file, whose imports it may need
        self.normalize = normalize
        self.foreign = foreign
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalized(self, x):
        """Images as the backbone sees them."""
        if self.normalize == "dataset":
            return (x - self.mean) / self.std
        if self.normalize == "image":  # the usual floor: an image of one colour becomes zero
            std = x.flatten(1).std(1, correction=0).clamp(min=x[0].numel() ** -0.5)
            return (x - x.mean((1, 2, 3), keepdim=True)) / std.view(-1, 1, 1, 1)
        return x

    def forward(self, x, normalize=True):
        """Logits (N, classes) of images in [0, 1], or of images as `normalized` returns them."""
        if normalize:
            x = self.normalized(x)
        if self.foreign:
            x = x.clone(memory_format=torch.contiguous_format).to(computed_in(self.net, x.dtype))
        kept = random_numbers_kept(x.device) if self.sets_seed else contextlib.nullcontext()
        code = own_code[self.code].running() if self.code else contextlib.nullcontext()
        with kept, code:
            logits = self.net(x)
        if not torch.is_tensor(logits) or not logits.is_floating_point():
            return logits
        if type(logits) is not torch.Tensor:
            logits = logits.as_subclass(torch.Tensor)  # one of the user's own kind
        is_low = logits.dtype in (torch.bfloat16, torch.float16)
        return logits.float() if is_low or self.foreign else logits


def random_numbers_kept(device):
    """A context that puts torch's random numbers back on leaving."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def sets_seed(model, facts):
    """Whether a forward in eval mode sets torch's seed: an attack's draws would repeat.

    Its random numbers then end at the same place wherever they began.
    """
    ends = []
    with random_numbers_kept(model.mean.device), contextlib.suppress(Exception):
        for seed in (1, 2):
            torch.manual_seed(seed)
            logits_of_zeros(model, 2, facts)
            ends.append(torch.get_rng_state())
    return len(ends) == 2 and torch.equal(*ends)


def computed_in(net, default):
    """The floating type of a network's first matrix of weights, or of its first number at all.

    A number beside the layers, such as a temperature, may have another type. `default` where there
    is none.
    """
    first = None
    for value in itertools.chain(net.parameters(), net.buffers()):
        if nn.parameter.is_lazy(value):  # has no type yet
            continue
        if value.is_floating_point() and value.element_size() > 1:
            if value.ndim > 1:
                return value.dtype
            first = first or value.dtype
    return first or default


BACKBONES = ("lenet+, cnn-small, wrn-DEPTH-WIDTH (as in wrn-28-10), resnet18, 34, 50, 101 or 152, "
             "vgg11, 13 or 19, densenet-bc-100, eat-a to eat-d, or your own: "
             "path/to/file.py:function")


def build_model(name, facts, normalize="none", device="cpu"):
    """A freshly initialised Classifier for a data set.

    name: of BACKBONES; "path/to/file.py:function" imports the file and calls the function, which
    returns the network. facts: of `dataset_facts`. UsageError for an unknown backbone, and for one
    that does not turn such images into one logit per class.
    """
    own = ".py:" in name
    net = imported_net(name, facts["classes"]) if own else known_net(name, facts)
    model = Classifier(net, normalize, facts["mean"], facts["std"], foreign=own)
    if own:
        model.code = name
        model.to(device)  # a forward may name a device
    check_logits(model, name, facts)
    if own:
        model.sets_seed = sets_seed(model, facts)
        return model
    return model.to(device, memory_format=torch.channels_last)


def known_net(name, facts):
    """A backbone by name, as `build_model`, without the layer that normalises."""
    channels, height, width = facts["shape"]
    classes = facts["classes"]
    if name == "lenet+":
        return lenet_plus(channels, height, width, classes)
    if name == "cnn-small":
        return cnn_small(channels, height, width, classes)
    if re.fullmatch(r"wrn-\d+-\d+", name):
        return wide_resnet(name, channels, classes)
    if re.fullmatch("eat-[abcd]", name):
        return eat_source(name, facts)
    if re.fullmatch("resnet(18|34|50|101|152)|vgg(11|13|19)|densenet-bc-100", name):
        return torchvision_net(name, channels, min(height, width), classes)
    raise UsageError(f"unknown model {name!r}: choose {BACKBONES}")


def check_logits(model, name, facts):
    """UsageError where a model in eval mode does not map one image to a logit per class.

    A network that normalises by its batch may need two images.
    """
    try:
        logits = logits_of_zeros(model, 1, facts)
    except Exception as error:  # a network of the user's own may raise anything
        try:
            logits = logits_of_zeros(model, 2, facts)
        except Exception:
            raise too_small(name, facts, error)
    shape = tuple(getattr(logits, "shape", ()))
    if not torch.is_tensor(logits):
        raise UsageError(f"--model {name}: gives {type(logits).__name__}, it must return the "
                         f"logits alone, (1, {facts['classes']}) for one image of {facts['name']}")
    if shape not in ((1, facts["classes"]), (2, facts["classes"])):
        raise UsageError(f"--model {name}: gives {shape} for one image of {facts['name']}, it "
                         f"must be (1, {facts['classes']})")
    if not logits.is_floating_point():
        raise UsageError(f"--model {name}: gives {logits.dtype}, logits must be floating numbers")


def logits_of_zeros(model, n, facts):
    """What a model in eval mode returns for n black images."""
    with torch.no_grad(), model_mode(model, "eval"):
        return model(torch.zeros(n, *facts["shape"], device=model.mean.device))


def too_small(name, facts, error):
    """The UsageError for a network that cannot take images of this size.

    One of the user's own may fail for any reason.
    """
    channels, height, width = facts["shape"]
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if ".py:" in name:
        return UsageError(f"--model {name}: does not take images of {height} x {width} pixels, "
                          f"a tensor (1, {channels}, {height}, {width}) "
                          f"({type(error).__name__}: {reason})")
    return UsageError(f"--model {name}: does not take images of {height} x {width} pixels and "
                      f"{channels} channels, they may be too small ({reason})")


def lenet_plus(channels, height, width, classes):
    """LeNet+ (SAT-Rx, table 1). The convolutions are padded by 2: 28x28 gives 3,136 features.

    ReLU comes after max-pooling: the same function and gradient, a sixth faster.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * (height // 4) * (width // 4), 1024), nn.ReLU(),
        nn.Linear(1024, classes))


def cnn_small(channels, height, width, classes):
    """MNIST's network of fast adversarial training (Wong et al. 2020), convolutions of stride 2."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * (height // 4) * (width // 4), 100), nn.ReLU(),
        nn.Linear(100, classes))


own_code = {}  # a user's network, "path/to/file.py:function" -> its OwnCode


def code_sha256(name):
    """sha256 over the files that have built and run a user's network, as named in `own_code`.

    They are its code and what it has read: a table of numbers, a file of settings.
    """
    return own_code[name].sha256()


def imported_net(name, classes):
    """The network that a user's function returns, "path/to/file.py:function".

    The file is imported as from its own folder: its neighbours and its relative imports are found.
    The function may take num_classes; a network takes the function's place. UsageError where there
    is no such network.
    """
    path, _, function = name.rpartition(":")
    code = OwnCode(path)
    try:
        with code.running(), process_settings_kept():
            net = net_of(code, function, classes)
    except (Exception, SystemExit) as error:
        raise UsageError(f"--model {name}: {type(error).__name__}: {error}{where_to_find(error)}")
    if not isinstance(net, nn.Module):
        raise UsageError(f"--model {name}: {function}() must return a torch.nn.Module, not "
                         f"{type(net).__name__}")
    if any(value.device.type == "meta" for value in net.parameters()):
        raise UsageError(f"--model {name}: its weights are on the device meta, they have no "
                         "values: make them on the CPU")
    try:
        with model_mode(net, "eval"):
            pass
    except Exception as error:
        raise UsageError(f"--model {name}: its train() must be torch's, rename a method of your "
                         f"own ({type(error).__name__}: {error})")
    own_code[name] = code
    return net


def net_of(code, function, classes):
    """What a function of a user's file returns, or the network of this name."""
    try:
        module = code.imported()
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import_torchvision()
        module = code.imported()
    if not hasattr(module, function):
        raise AttributeError(f"{code.path.name} has no {function!r}")
    make = getattr(module, function)
    return make if isinstance(make, nn.Module) else made_net(make, classes)


def where_to_find(error):
    """The end of a message about a module that is missing, "" for another error."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return ": install it, or let PYTHONPATH name the folder that holds it"


def made_net(make, classes):
    """What a user's function returns; num_classes is given where it takes it.

    TypeError where it needs other arguments.
    """
    parameters = inspect.signature(make).parameters.values()
    takes_classes = any(parameter.name == "num_classes" for parameter in parameters)
    needed = [parameter.name for parameter in parameters
              if parameter.default is parameter.empty and parameter.name != "num_classes"
              and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]
    if needed:
        raise TypeError(f"it needs {', '.join(needed)}: name a function that takes nothing, or "
                        "num_classes alone")
    return make(num_classes=classes) if takes_classes else make()


class OwnCode:
    """A user's file, and the modules of its own that it imports, as it is read or later.

    They are those of its folder, of PYTHONPATH and of the paths that it adds to sys.path;
    installed packages do not count. While the file runs they are in sys.modules. At other times
    they are not, nor do ours hide them: two files may have neighbours of the same names.
    """

    running_now = None  # the OwnCode whose file runs
    listens = False  # whether `note_opened` is called, which nothing undoes

    def __init__(self, path):
        if not OwnCode.listens:
            sys.addaudithook(note_opened)
            OwnCode.listens = True
        self.path = Path(path)
        self.folder = self.path.resolve().parent
        self.package = f"own_{abs(hash(str(self.folder)))}"
        self.search = [str(self.folder), *sys.path]  # its sys.path
        self.modules = {}  # name -> module
        self.opened = set()  # paths of what the file has read
        for name in list(sys.modules):  # of an earlier import: its files may have changed
            if name.startswith(f"{self.package}."):
                del sys.modules[name]
        here = Path(__file__).resolve().parent
        neighbours = {entry.stem for entry in self.folder.glob("*")}
        self.hidden = []  # names of ours that are its neighbours' names
        if self.folder != here:
            self.hidden = [name for name, module in sys.modules.items()
                           if name.partition(".")[0] in neighbours and lies_in(module, here)]

    def imported(self):
        """The module of the file, read anew with its neighbours, as a part of a package.

        As `python -c "import net"` does in its folder. An argparse of the file does not see our
        flags.
        """
        sys.modules[self.package] = types.ModuleType(self.package)
        sys.modules[self.package].__path__ = [str(self.folder)]
        name = f"{self.package}.{self.path.stem.replace('.', '_')}"
        spec = importlib.util.spec_from_file_location(name, self.path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        return module

    @contextlib.contextmanager
    def running(self):
        """A context in which the file's code finds what it imports."""
        outside = list(sys.path)
        arguments = sys.argv
        away = {name: sys.modules.pop(name) for name in self.hidden if name in sys.modules}
        away.update({name: sys.modules[name] for name in self.modules.keys() & sys.modules.keys()})
        before = set(sys.modules)
        sys.modules.update(self.modules)
        sys.path[:] = self.search
        sys.argv = [str(self.path)]
        outer = OwnCode.running_now
        OwnCode.running_now = self
        try:
            yield
        finally:
            OwnCode.running_now = outer
            self.search = list(sys.path)
            sys.path[:] = outside
            sys.argv = arguments
            self.keep(set(sys.modules) - before - self.modules.keys())
            for name in self.modules:
                if name.partition(".")[0] != self.package:
                    sys.modules.pop(name, None)
            sys.modules.update(away)

    def keep(self, names):
        """Remember which of the modules of these names are the file's own."""
        roots = self.roots() if names else []
        for name in names:
            if any(lies_in(sys.modules[name], root) for root in roots):
                self.modules[name] = sys.modules[name]

    def roots(self):
        """The folders of its own modules; while the file does not run."""
        added = [entry for entry in self.search if entry not in sys.path]
        added += os.environ.get("PYTHONPATH", "").split(os.pathsep)
        return [self.folder, *(Path(entry).resolve() for entry in added if entry)]

    def sha256(self):
        """sha256 over names and contents of the file, of its own modules and of what it read."""
        named = [getattr(module, "__file__", None) for module in self.modules.values()]
        roots = self.roots()
        if Path.cwd() != Path(Path.cwd().anchor):  # below "/" lies the whole system
            roots.append(Path.cwd())
        named += [file for file in self.opened if any(is_below(file, root) for root in roots)]
        files = {self.path.resolve(), *(Path(file).resolve() for file in named if file)}
        digest = hashlib.sha256()
        for file in sorted(files):
            if file.is_file() and file.suffix != ".pyc":
                name = os.path.relpath(file, self.folder)
                digest.update(f"{name} {file.stat().st_size} ".encode() + file.read_bytes())
        return digest.hexdigest()


def note_opened(event, arguments):
    """Python's audit hook: remember what a user's file reads while it runs."""
    if event != "open" or OwnCode.running_now is None:
        return
    path, _, flags = arguments
    written = flags & (os.O_WRONLY | os.O_RDWR)
    if isinstance(path, (str, bytes)) and not written:
        OwnCode.running_now.opened.add(os.path.abspath(os.fsdecode(path)))


@contextlib.contextmanager
def process_settings_kept():
    """Put back on leaving what a user's file may change for all networks and all paths."""
    folder = os.getcwd()
    dtype = torch.get_default_dtype()
    device = torch.get_default_device()
    records = torch.is_grad_enabled()
    anomaly = torch.is_anomaly_enabled()
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with warnings.catch_warnings(), np.errstate():
            yield
    finally:
        os.chdir(folder)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:  # None: torch's own, without a mode's cost
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_grad_enabled(records)
        torch.autograd.set_detect_anomaly(anomaly)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)


def lies_in(module, folder):
    """Whether a module's file is in a folder, or below it; installed packages do not count.

    A package without __init__.py has a folder instead of a file.
    """
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    return bool(file) and is_below(file, folder)


def is_below(file, folder):
    """Whether a file is in a folder, or below it, and is not one of an installed package."""
    file = Path(file).resolve()
    if folder not in file.parents:
        return False
    below = file.relative_to(folder).parts
    installed = "site-packages" in below or "dist-packages" in below
    return not installed and STANDARD_LIBRARY not in file.parents


def eat_source(name, facts):
    """Source model A, B, C or D of ensemble adversarial training (SAT-Rx, table 1).

    Unpadded convolutions of stride 1. UsageError where the images are too small.
    """
    channels, height, width = facts["shape"]
    if name == "eat-a":
        layers = [nn.Conv2d(channels, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5), nn.ReLU(),
                  nn.Dropout(0.25), nn.Flatten(), nn.LazyLinear(128), nn.ReLU(), nn.Dropout(0.5)]
    elif name == "eat-b":
        layers = [nn.Dropout(0.2), nn.Conv2d(channels, 64, 8), nn.ReLU(), nn.Conv2d(64, 128, 6),
                  nn.ReLU(), nn.Conv2d(128, 128, 5), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    elif name == "eat-c":
        layers = [nn.Conv2d(channels, 128, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(128, 64, 3),
                  nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(128), nn.ReLU()]
    else:
        layers = [nn.Flatten()]
        for _ in range(4):
            layers += [nn.LazyLinear(300), nn.ReLU(), nn.Dropout(0.5)]
    net = nn.Sequential(*layers, nn.LazyLinear(facts["classes"])).eval()
    try:
        net(torch.zeros(1, channels, height, width))  # sets the sizes that lazy layers leave open
    except RuntimeError as error:
        raise too_small(name, facts, error)
    return net.train()


def torchvision_net(name, channels, pixels, classes):
    """torchvision's ResNets, VGGs (with BatchNorm) and DenseNet-BC-100.

    Images below 64 pixels get the usual small stem, a 3x3 convolution of stride 1 without
    max-pool, and VGGs one linear layer behind the convolutions.
    """
    models = import_torchvision().models
    if name.startswith("densenet"):
        # Depth 100 = 3 blocks of 16 bottlenecks, 2 convolutions each, + 4; growth 12.
        net = models.DenseNet(growth_rate=12, block_config=(16, 16, 16), num_init_features=24,
                              num_classes=classes)
    elif name.startswith("vgg"):
        net = getattr(models, f"{name}_bn")(num_classes=classes)
    else:
        net = getattr(models, name)(num_classes=classes)
    if pixels >= 64 and channels == 3:
        return net
    if pixels >= 64:
        replace_first_convolution(net, channels)
    elif name.startswith("densenet"):
        net.features.conv0 = nn.Conv2d(channels, 24, 3, padding=1, bias=False)
        net.features.norm0 = nn.Identity()
        net.features.relu0 = nn.Identity()
        net.features.pool0 = nn.Identity()
    elif name.startswith("vgg"):
        net.features[0] = nn.Conv2d(channels, 64, 3, padding=1)
        net.avgpool = nn.AdaptiveAvgPool2d(1)
        net.classifier = nn.Linear(512, classes)
    else:
        net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


def replace_first_convolution(net, channels):
    """Give a network of torchvision's a first convolution for images of so many channels."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            first = nn.Conv2d(channels, module.out_channels, module.kernel_size, module.stride,
                              module.padding, bias=module.bias is not None)
            net.set_submodule(name, first)
            return


class WideBlock(nn.Module):
    """Pre-activation residual block: BN-ReLU-conv twice.

    Where shapes differ, the shortcut is a 1x1 convolution of the activation.
    """

    def __init__(self, channels_in, channels_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if channels_in != channels_out or stride != 1:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x):
        active = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(active)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideResNet(nn.Sequential):
    """Wide residual network (Zagoruyko and Komodakis 2016): three groups of `blocks` blocks.

    The groups are 16, 32 and 64 times `widen` channels wide.
    """

    def __init__(self, blocks, widen, channels, classes):
        layers = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
        width = 16
        for group, group_width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for block in range(blocks):
                stride = 2 if group > 0 and block == 0 else 1
                layers.append(WideBlock(width, group_width, stride))
                width = group_width
        super().__init__(*layers, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(width, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def wide_resnet(name, channels, classes):
    """The WideResNet of a name such as wrn-28-10: depth and width. Depth 32 has five blocks."""
    _, depth, widen = name.split("-")
    blocks = (int(depth) - 4) / 6
    if depth == "32":  # fits no such depth; the field builds it with five blocks
        blocks = 5
    if blocks < 1 or blocks != int(blocks) or int(widen) < 1:
        raise UsageError(f"--model {name}: the depth of a WRN is 6 n + 4 (10, 16, 22, 28, 34, 40 "
                         "...) or 32")
    return WideResNet(int(blocks), int(widen), channels, classes)


# ------------------------------------------------------------------------------- double backward

def twice_differentiable(model, x):
    """model(x), for a loss that contains its own gradient with respect to x, as ATLAS's does.

    Values and gradients are PyTorch's, but for rounding in what is differentiated twice. There
    BatchNorm in train mode is faster: PyTorch's own goes over the activations some 30 times, and
    changes their layout in memory.
    """
    if not x.requires_grad:
        return model(x)
    with FastBatchNorm():
        return model(x)


BATCH_NORM = inspect.signature(F.batch_norm)


class FastBatchNorm(torch.overrides.TorchFunctionMode):
    """Inside it, BatchNorm with weights in train mode is `BatchNorm`, in any network."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.batch_norm:
            call = BATCH_NORM.bind(*args, **kwargs)
            call.apply_defaults()
            x, running_mean, running_var, weight, bias, training, momentum, eps = call.args
            if training and weight is not None and bias is not None and len(x) > 1:
                return BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps)
        return function(*args, **kwargs)


class BatchNorm(torch.autograd.Function):
    """y = weight xhat + bias. xhat = (x - mean) r, r = 1 / deviation, of the batch's channels."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, r = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True,
                                             momentum, eps)
        ctx.save_for_backward(x, weight, mean, r)
        return y

    @staticmethod
    def backward(ctx, dy):
        return *BatchNormBackward.apply(dy, *ctx.saved_tensors), None, None, None, None


class BatchNormBackward(torch.autograd.Function):
    """dx = weight r (dy - <dy> - xhat <dy xhat>), dweight = sum(dy xhat), dbias = sum(dy).

    <.> is the mean over all but the channels. The gradient of these three is written by hand.
    """

    @staticmethod
    def forward(ctx, dy, x, weight, mean, r):
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, r, True, 0.0, [True, True, True])
        ctx.save_for_backward(dy, x, weight, mean, r, dweight, dbias)
        return dx, dweight, dbias

    @staticmethod
    def backward(ctx, v, a, b):
        """v, a, b: the gradients with respect to dx, dweight, dbias."""
        dy, x, weight, mean, r, dy_xhat, dy_sum = ctx.saved_tensors
        n = dy.numel() // len(mean)
        v_xhat, v_sum = channel_sums(v, x, mean, r)
        v_dy, _ = channel_sums(v, dy, torch.zeros_like(mean), torch.ones_like(mean))
        dot = v_dy - (v_sum * dy_sum + v_xhat * dy_xhat) / n  # of v with dx / (weight r)
        scale = weight * r
        # The gradient with respect to xhat is of_v v + of_dy dy. It reaches x as in BatchNorm.
        of_v = -scale * dy_xhat / n
        of_dy = a - scale * v_xhat / n
        slope = -(of_v * v_xhat + of_dy * dy_xhat + scale * dot) / n  # the last: r depends on x
        shift = -(of_v * v_sum + of_dy * dy_sum) / n
        grad_dy = affine(x, mean, r, of_dy, b - scale * v_sum / n)
        grad_dy.addcmul_(v, as_channels(scale, x))
        grad_x = affine(x, mean, r, r * slope, r * shift)
        grad_x.addcmul_(v, as_channels(r * of_v, x)).addcmul_(dy, as_channels(r * of_dy, x))
        return grad_dy, grad_x, r * dot, None, None


def channel_sums(v, x, mean, r):
    """(sum of v xhat, sum of v) over all but the channels."""
    return torch.ops.aten.native_batch_norm_backward(
        v, x, None, None, None, mean, r, True, 0.0, [False, True, True])[1:]


def affine(x, mean, r, slope, shift):
    """slope xhat + shift, as x; all but x have one value per channel."""
    return torch.batch_norm(x, slope, shift, mean, r**-2, False, 0.0, 0.0, False)


def as_channels(values, x):
    """A value per channel, (C,), that broadcasts against x, (N, C, ...), of its type."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


# ---------------------------------------------------------------------------- losses and attacks

def cross_entropy(logits, y):
    """Cross-entropy per image, (N,)."""
    return F.cross_entropy(logits, y, reduction="none")


def kl(logits, reference):
    """KL(softmax(reference) || softmax(logits)) per image, (N,).

    It is finite for any finite logits. Gradients flow into both.
    """
    log_p = F.log_softmax(reference, 1)
    log_q = F.log_softmax(logits, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def margin(logits, y):
    """Highest wrong logit minus the true one, (N,): above 0 where misclassified. PGD-CW's loss."""
    true = logits.gather(1, y[:, None])[:, 0]
    return logits.scatter(1, y[:, None], -math.inf).amax(1) - true


@contextlib.contextmanager
def model_mode(model, mode):
    """Put every submodule into "train" or "eval" mode, and back on leaving, also on an error."""
    before = [(module, module.training) for module in model.modules()]
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def input_gradient(model, x, target, loss=cross_entropy):
    """(gradient of each image's loss with respect to the image, logits), both detached.

    The model stays in its present mode. No parameter's .grad is read or written.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        logits = model(x)
        grad, = torch.autograd.grad(loss(logits, target).sum(), x)
    return grad, logits.detach()


def per_image(value, x):
    """A number, or a tensor (N,), as a tensor that broadcasts against images x (N, C, H, W)."""
    if not torch.is_tensor(value):
        value = torch.full((len(x),), value, dtype=x.dtype, device=x.device)
    return value.to(x).view(-1, *[1] * (x.dim() - 1))


def check_images(x):
    """ValueError where images are outside [0, 1].

    Not for images on a GPU: reading the answer would make every training step wait for it.
    """
    if x.device.type == "cpu" and not ((x >= 0) & (x <= 1)).all():
        raise ValueError("attacks take images in [0, 1]: normalisation belongs inside the model")


def l1_norm(grad):
    """Of each image's gradient, (N, 1, 1, 1), never 0."""
    return grad.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-30)


def linf_attack(model, x, target, eps, step, steps, loss=cross_entropy, start=None, momentum=None,
                targeted=False, labels=None, mode="eval"):
    """The gradient loop of every L-infinity attack: x' <- clip(x' + step * sign(gradient)).

    clip: into the eps-ball around x and into [0, 1]. Returns x', (N, C, H, W), detached.
    x: images in [0, 1], else ValueError. eps, step: numbers or tensors (N,), in [0, 1] units.
    target: what `loss` compares logits with, a row per image: labels, or logits for kl.
    start: function (x, eps) -> first iterate; x itself by default.
    momentum: mu of MI-FGSM (SAT-Rx eq. 10). targeted: the loss is to fall.
    labels: (N,); an image is done at its first iterate that is not classified so (evaluation).
    mode: the model's while it is attacked, "eval" or "train"; its own is restored.
    """
    check_images(x)
    if not len(x):  # half of a batch of one: networks need not take an empty batch
        return x.detach()
    x = x.detach()
    eps = per_image(eps, x)
    step = per_image(-step if targeted else step, x)
    low = (x - eps).clamp(min=0)
    high = (x + eps).clamp(max=1)
    x_adv = x if start is None else start(x, eps)
    velocity = torch.zeros_like(x_adv)
    result = x.clone()
    rows = torch.arange(len(x), device=x.device)  # the images that are still attacked
    with model_mode(model, mode):
        for _ in range(steps):
            grad, logits = input_gradient(model, x_adv, target, loss)
            if labels is not None:
                holds = logits.argmax(1) == labels[rows]
                result[rows[~holds]] = x_adv[~holds]
                state = (rows, x_adv, target, step, low, high, velocity, grad)
                rows, x_adv, target, step, low, high, velocity, grad = [t[holds] for t in state]
                if not len(rows):
                    return result
            if momentum is not None:
                velocity = momentum * velocity + grad / l1_norm(grad)
                grad = velocity
            x_adv = (x_adv + step * grad.sign()).clamp(low, high)
    result[rows] = x_adv.clamp(low, high)
    return result


def uniform_start(x, eps):
    """PGD's random start: uniform in the eps-ball, clipped to [0, 1]."""
    return (x + eps * uniform_like(x)).clamp(0, 1)


def gaussian_start(x, eps):
    """TRADES's random start: a Gaussian of deviation 0.001 around x (Zhang et al. 2019)."""
    return (x + 0.001 * normal_like(x)).clamp(0, 1)


def fgsm(model, x, target, eps, **options):
    """x + eps sign(gradient) (Goodfellow et al. 2015; SAT-Rx eq. 1). options: of linf_attack."""
    return linf_attack(model, x, target, eps, eps, 1, **options)


def rfgsm(model, x, target, eps, alpha, **options):
    """A step of alpha in a random sign direction, then one of eps - alpha along the gradient.

    SAT-Rx eqs. 2 and 3. The point between is not clipped, as printed; the result is.
    """
    def noise(x, eps):
        return x + alpha * normal_like(x).sign()
    return linf_attack(model, x, target, eps, eps - alpha, 1, start=noise, **options)


def ifgsm(model, x, target, eps, steps, **options):
    """Iterative FGSM with steps of eps / steps from x itself (SAT-Rx eqs. 4 and 5)."""
    return linf_attack(model, x, target, eps, eps / steps, steps, **options)


def pgd(model, x, target, eps, step, steps, start=uniform_start, **options):
    """Projected gradient descent from a random start (Madry et al. 2018; SAT-Rx eqs. 7, 8)."""
    return linf_attack(model, x, target, eps, step, steps, start=start, **options)


def mi_fgsm(model, x, target, eps, steps, mu=1.0, **options):
    """Iterative FGSM with momentum over L1-normalised gradients (SAT-Rx eqs. 9 to 11)."""
    return linf_attack(model, x, target, eps, eps / steps, steps, momentum=mu, **options)


def pixel_scale(facts):
    """The mean deviation of the data set's pixels.

    A radius in units of normalised images, multiplied by it, is in [0, 1] units.
    """
    return sum(facts["std"]) / len(facts["std"])


def correct(model, split, batch_size=None, attack=None):
    """Which images of a split the model, in eval mode, classifies correctly: bool (N,).

    batch_size: as in `eval_batches`. attack: function (x, y) -> perturbed images, or None. Several
    processes share the work.
    """
    flags = torch.zeros(len(split.labels), dtype=torch.int, device=split.labels.device)
    with model_mode(model, "eval"):
        for x, y, rows in eval_batches(split, batch_size, shared=True):
            if attack is not None:
                x = attack(x, y)
            with torch.no_grad():
                flags[rows] = (model(x).argmax(1) == y).int()
    return summed(flags).bool()


def accuracy(model, split, batch_size=None, attack=None):
    """The share of a split that the model classifies correctly; arguments as in `correct`."""
    return correct(model, split, batch_size, attack).float().mean().item()


# --------------------------------------------------------------------------- runs and checkpoints

FORMAT = 1  # of the checkpoint's dictionary; raise it when a field changes its meaning


def write_beside(path, write):
    """Call write(file) on PATH.PID.part and rename it to PATH.

    A reader, or a crash, never sees half a file.
    """
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
    """A file of tensors and plain values onto the CPU: of torch.save or of safetensors.

    No code of the file is run. UsageError where it cannot be read.
    """
    if Path(path).is_fifo():
        raise UsageError(f"{path}: is a pipe, name a file")
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head[8:] == b"{":  # the length of a JSON header, then the header
            return load_safetensors(path)
        if head.startswith(b"{"):
            return load_shards(path)
        with torch.serialization.safe_globals(plain_values()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})")
    except Exception as error:
        if "TorchScript" in str(error):
            raise UsageError(f"{path}: is a TorchScript archive, save its state_dict instead")
        found = re.search(r"unsupported (?:global|class)[: ]*(?:GLOBAL )?([\w.]*)",
                          str(error), re.IGNORECASE)
        if found:
            raise UsageError(f"{path}: refused: loading it would run code ({found[1]}), save its "
                             "state_dict instead")
        raise UsageError(f"{path}: {what_it_is(path, head)} ({type(error).__name__})")


def what_it_is(path, head):
    """Words for a file that is no checkpoint. head: its first bytes."""
    if not head:
        return "is empty"
    if head.startswith((b"<", b"version ")):
        return "is text, a web page or a Git LFS pointer: fetch the file itself"
    if head.startswith(b"\x80"):
        return "is a pickle that torch.save did not write: save its state_dict by torch.save"
    if holds_arrays(path):
        return "is numpy's .npz: save its arrays as tensors by torch.save"
    if zipfile.is_zipfile(path) or tarfile.is_tarfile(path):
        return "is an archive, but not of torch.save: unpack it and name a file of it"
    return "not a checkpoint, or a damaged one"


def holds_arrays(path):
    """Whether a file is an archive of numpy's arrays."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(name.endswith(".npy") for name in archive.namelist())


def load_shards(path):
    """The tensors of all files that an index in JSON names, as Hugging Face shares large ones."""
    try:
        files = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: is JSON, not weights: name the file that holds the weights")
    tensors = {}
    for file in files:
        tensors.update(load_file(Path(path).parent / Path(file).name))
    return tensors


def load_safetensors(path):
    """The tensors of a .safetensors file: name -> tensor."""
    try:
        from safetensors.torch import load_file as load
    except ImportError:
        raise UsageError(f"{path}: is a safetensors file: pip install safetensors")
    return load(path)


def plain_values():
    """What torch.load may build besides tensors: numpy's numbers and arrays, flags, paths.

    None of them runs code of the file.
    """
    core = np._core if hasattr(np, "_core") else np.core
    allowed = [np.ndarray, np.dtype, argparse.Namespace]
    allowed += [value for value in vars(np.dtypes).values() if isinstance(value, type)]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1 and 2
        for name in ("scalar", "_reconstruct"):
            allowed.append((getattr(core.multiarray, name), f"{module}.{name}"))
    for name in ("PosixPath", "WindowsPath"):
        allowed += [(plain_path, f"pathlib.{name}"), (plain_path, f"pathlib._local.{name}")]
    return allowed


def plain_path(*parts):
    """A path as text, whatever system it was written on."""
    return "/".join(map(str, parts))


RUN_FIELDS = {"format", "script", "model", "dataset", "num_classes", "input_shape", "normalize",
              "args", "provenance", "history", "best", "last"}


def is_run(content):
    """Whether the content of a file is a run of ours."""
    return isinstance(content, dict) and RUN_FIELDS <= content.keys()


def load_checkpoint(path):
    """The dictionary that training wrote to `path`, checked to be one."""
    return checked_run(load_file(path), path)


def checked_run(content, path):
    """The content of a run's file; UsageError where it is none, or of another format."""
    if not is_run(content):
        raise UsageError(f"{path}: not a checkpoint of a run")
    if content["format"] != FORMAT:
        raise UsageError(f"{path}: has format {content['format']}, this code reads {FORMAT}")
    if content["normalize"] not in NORMALIZATIONS:
        raise UsageError(f"{path}: names a normalisation that this code does not have")
    return content


def holds_weights(path):
    """The content of a file; UsageError where it is neither a run nor holds a state_dict."""
    content = load_file(path)
    if not is_run(content) and not list(state_dicts_in(content)):
        raise UsageError(f"{path}: not a checkpoint of a run, nor a state_dict of tensors")
    return content


def load_init(model, path):
    """Load the last weights of a run into a model, or its best where it has no last.

    A file of somebody else's weights is read, too. Returns the checkpoint, or {} of such a file.
    """
    content = holds_weights(path)
    checkpoint = checked_run(content, path) if is_run(content) else {}
    if checkpoint:
        if checkpoint["normalize"] != model.normalize:
            raise UsageError(f"{path}: its network has --normalize {checkpoint['normalize']}, "
                             f"this one {model.normalize}")
        content = (checkpoint["last"] or checkpoint["best"])["state_dict"]
    load_weights(model, content, path)
    broken = weights_with_nan(model)
    if broken:
        raise UsageError(f"{path}: holds NaN in {shortened(', '.join(broken))}: nothing can be "
                         "trained from it")
    return checkpoint


def weights_with_nan(model):
    """The names of a Classifier's parameters that hold NaN somewhere."""
    return [name for name, value in model.net.named_parameters() if value.isnan().any()]


def copy_of_weights(net):
    """A network's state_dict on the CPU; what is no tensor (get_extra_state) stays as it is."""
    return {name: value.detach().cpu().clone() if torch.is_tensor(value) else value
            for name, value in net.state_dict().items()}


def teacher_beside(path):
    """The path of run.teacher.pt beside run.pt, run.align.pt or run.k50.pt; None without it."""
    path = Path(path)
    names = [path.stem, Path(path.stem).stem]
    found = [path.with_name(f"{name}.teacher.pt") for name in names]
    found = [str(teacher) for teacher in found if teacher.exists()]
    return found[0] if found else None


# Where files keep a state_dict, the first that fits is taken. Names that are not here come last.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module",
            "ema", "ema_state_dict", "state_dict_ema", "model_ema", "params", "weights")
# Numbers that a network may lack, or have beside its weights: BatchNorm's and averages' counters.
COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
# What a Lightning module keeps beside its network; no image goes through it.
BESIDE = ("criterion", "loss", "loss_fn", "loss_func", "metrics", "train_acc", "val_acc",
          "test_acc", *COUNTERS)
EXTRA = "_extra_state"  # torch's name for what get_extra_state keeps


def load_weights(model, content, path):
    """Strictly load a backbone's state_dict, bare or in the usual wrappers.

    Prefixes go, or come, where the names then fit. UsageError if nothing in the file fits.
    """
    found = list(state_dicts_in(content))
    own = model.net.state_dict()
    fitting = [(place, state) for place, state in found if fitted(state, own) is not None]
    if not fitting:
        fitting = parts_of(found, own, path)
    same = [(place, state) for place, state in fitting if same_shapes(fitted(state, own), own)]
    fitting = same or fitting
    place, state = (fitting or found)[0]
    if len(fitting) > 1:
        others = ", ".join(place for place, _ in fitting[1:])
        print(f"{path}: the weights are those of {place!r}, the file also holds {others} (save "
              "one alone to take it)")
    weights = fitted(state, own)
    if weights is None:
        raise UsageError(f"{path}: its weights do not fit the model ({misfit(state, own)})"
                         f"{own_code_hint(model)}")
    for name, _ in model.net.named_parameters():
        kind = getattr(weights.get(name), "dtype", torch.float32)
        if getattr(weights.get(name), "is_meta", False):
            raise UsageError(f"{path}: {name} is on the device meta, it has no values: save the "
                             "network after it is loaded")
        floating = name in own and own[name].is_floating_point()
        if floating and not kind.is_floating_point:
            raise UsageError(f"{path}: {name} holds {kind}, it must be floating numbers")
    try:
        model.net.load_state_dict(weights)
    except Exception as error:  # of a network of the user's own, too
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        reason = reason.rpartition("an exception occurred : ")[2]
        raise UsageError(f"{path}: its weights do not fit the model ({shortened(reason)})"
                         f"{own_code_hint(model)}")


def same_shapes(weights, own):
    """Whether each tensor of a state_dict has the shape of the network's own."""
    shapes = {name: getattr(value, "shape", None) for name, value in own.items()}
    return all(getattr(weights.get(name), "shape", None) == shapes[name] for name in shapes)


def fitted(state, own):
    """As `renamed`. Of several names of one tensor in `own` a file may lack all but one.

    safetensors keeps one of them.
    """
    found = renamed(state, own)
    twins = {} if found else missing_twins(state, own)
    if not twins:
        return found
    found = renamed(state, {name: own[name] for name in own if name not in twins})
    return found and found | {name: found[twin] for name, twin in twins.items()}


def missing_twins(state, own):
    """{name in `own` that a file lacks: another name of the same tensor, which the file has}."""
    groups = {}
    for name, value in own.items():
        if torch.is_tensor(value) and value.layout is torch.strided and value.numel():
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            groups.setdefault(key, []).append(name)
    given = [f".{name}" for name in without_wrappers(state, ()) or state]
    twins = {}
    for names in groups.values():
        has = [name for name in names if any(key.endswith(f".{name}") for key in given)]
        if has:
            twins.update({name: has[0] for name in names if name not in has})
    return twins


def misfit(state, own):
    """Words for the names that a state_dict and a network do not share, prefixes set aside."""
    given = without_wrappers(state, (*COUNTERS, EXTRA)) or {str(name): name for name in state}
    wanted = without_wrappers(own, (*COUNTERS, EXTRA)) or {name: name for name in own}
    pairs = itertools.product(without_heads(given), without_heads(wanted))
    given, wanted = max(pairs, key=lambda pair: len(pair[0].keys() & pair[1].keys()))
    missing = [wanted[name] for name in wanted if name not in given]
    surplus = [str(given[name]) for name in given if name not in wanted]
    words = []
    if missing:
        words.append(f"the file lacks {shortened(', '.join(missing), 100)}")
    if surplus:
        words.append(f"the model lacks {shortened(', '.join(surplus), 100)}")
    return "; ".join(words) or "two of its names are one without their prefixes"


def own_code_hint(model):
    """The end of a message about weights that do not fit one of this project's networks."""
    if model.code:
        return ""
    return "; this is our network of that name: yours is --model path/to/file.py:function"


def without_heads(names):
    """The same names, without a prefix that all share, and without one that only some have."""
    found = [names, *shorter(names)]
    for short in list(found):
        several = (name.split(".") for name in short if name.count(".") > 1)  # not one layer's
        for head in dict.fromkeys(parts[0] for parts in several):
            found.append({name.removeprefix(f"{head}."): old for name, old in short.items()})
    return found


def parts_of(found, own, path):
    """[(where it stands, state_dict)] where a state_dict holds several networks, as Lightning's.

    Each of them must fit `own`; losses and metrics count for nothing. UsageError where one fits,
    but a layer would be left out.
    """
    for place, state in found:
        whole = {str(name): name for name in state}
        for names in (whole, *shorter(whole)):
            parts = parts_by_head({name: state[old] for name, old in names.items()})
            fitting = [head for head in parts if renamed(parts[head], own) is not None]
            named = [head for head in WRAPPERS if head in fitting]
            if not named:
                continue
            others = [str(names[name]) for name in names
                      if name.partition(".")[0] in parts.keys() - set(fitting)]
            if others:
                raise UsageError(f"{path}: the weights under {named[0]!r} fit the model, but the "
                                 f"file also holds {shortened(', '.join(others))}: build the "
                                 "network with them, or save it without them")
            order = dict.fromkeys([*named, *fitting])
            return [(f"{place}.{head}".strip("."), parts[head]) for head in order]
    return []


def parts_by_head(state):
    """{first part of the names: state_dict of the rest}, without losses and metrics."""
    parts = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if head not in BESIDE:
            parts.setdefault(head, {})[rest] = value
    return parts


def shortened(text, most=200):
    """A text of at most so many characters."""
    return text if len(text) <= most else f"{text[:most]} ..."


def state_dicts_in(content, place="", depth=0):
    """(where it stands, state_dict) of each one in a file: bare first, then by WRAPPERS."""
    if isinstance(content, (list, tuple)):
        parts = [part for part in content if isinstance(part, dict)]
        content = dict(enumerate(parts))
    if not isinstance(content, dict) or depth > 8:
        return
    if content and any(torch.is_tensor(value) for value in content.values()):
        yield place, content
    order = {name: rank for rank, name in enumerate(WRAPPERS)}
    for key in sorted(content, key=lambda key: order.get(key, len(order))):
        yield from state_dicts_in(content[key], f"{place}.{key}".strip("."), depth + 1)


def renamed(state, own):
    """`state` under the names of `own`, a network's state_dict, or None where they do not fit.

    DistributedDataParallel's and torch.compile's parts of names count for nothing. A prefix that
    all names of one side share is left out. Counters may be missing, or too many. A file may lack
    what get_extra_state keeps.
    """
    if state.keys() == own.keys():
        return state
    optional = COUNTERS
    if not any(last_part(name) == EXTRA for name in state):
        optional = (*COUNTERS, EXTRA)
    given = without_wrappers(state, optional)
    wanted = without_wrappers(own, optional)
    if given is None or wanted is None:
        return None
    kept = {name: state.get(name, value) for name, value in own.items()
            if last_part(name) in optional}
    for names in (given, *shorter(given)):
        if names.keys() == wanted.keys():
            return {wanted[name]: state[old] for name, old in names.items()} | kept
    for names in shorter(wanted):
        if names.keys() == given.keys():
            return {names[name]: state[old] for name, old in given.items()} | kept
    return None


def last_part(name):
    return str(name).rpartition(".")[2]


def without_wrappers(state, optional):
    """{name without `module` and `_orig_mod`: name in `state`}; None where two would be one.

    optional: last parts of names that are left out.
    """
    names = {}
    for name in state:
        if last_part(name) in optional:
            continue
        parts = [part for part in str(name).split(".") if part not in ("module", "_orig_mod")]
        short = ".".join(parts)
        if short in names:
            return None
        names[short] = name
    return names


def shorter(names):
    """The same names without the prefix that they share: without one part of it, two ..."""
    while names:
        heads = {name.partition(".")[0] for name in names}
        if len(heads) > 1 or not all("." in name for name in names):
            return
        names = {name.partition(".")[2]: old for name, old in names.items()}
        yield names


def path_and_model(text):
    """(path, model or None) of CKPT or CKPT=MODEL, MODEL being a backbone or file.py:function."""
    path, equals, name = str(text).rpartition("=")
    if equals and not Path(text).exists() and Path(path).exists():
        return path, name
    return str(text), None


def load_model(path, weights="best", device="cpu", facts=None, architecture=None,
               normalize="none", foreign_facts=None):
    """(Classifier in eval mode, checkpoint dictionary) of a run's file or of somebody's weights.

    path: it may end in =MODEL, the network that the weights belong to.
    weights: "best" or "last". facts: those of the data set it must have been trained on, or None.
    architecture: the command line's --model. It is read where the file does not say what network
    it is of, and where the user's own file builds the network: code that a checkpoint names is not
    run. normalize, foreign_facts: of somebody's weights, where `facts` is None. UsageError where
    something does not fit.
    """
    path, name = path_and_model(path)
    architecture = name or architecture
    content = holds_weights(path)
    if not is_run(content):
        return load_foreign(path, content, weights, device, facts or foreign_facts, architecture,
                            normalize)
    checkpoint = checked_run(content, path)
    refuse_other_data(checkpoint, facts, path)
    if not checkpoint.get(weights):
        raise UsageError(f"{path}: holds no {weights} weights")
    name = checkpoint["model"]
    if ".py:" in name:
        if not architecture or ".py:" not in architecture:
            raise UsageError(f"{path}: {name} builds its network and is not run unasked: give "
                             "--model path/to/file.py:function")
        name = architecture
    facts = checkpoint_facts(checkpoint)
    model = build_model(name, facts, checkpoint["normalize"], device)
    load_weights(model, checkpoint[weights]["state_dict"], path)
    refuse_unsaved_values(model.eval(), name, facts, path)
    return model, checkpoint


def refuse_unsaved_values(model, name, facts, path):
    """UsageError where a user's network computes with values that no file holds.

    They would be others in the next process.
    """
    if model.code and not computes_the_same(model, name, facts):
        raise UsageError(f"{path}: the network of {name} computes with values that are not among "
                         "its weights: random ones (layers in a plain list, a buffer with "
                         "persistent=False?) or those of the first images that it sees. Register "
                         "them, or set the seed before they are drawn")


def computes_the_same(model, name, facts):
    """Whether a second network, built from other random numbers, computes as the first does.

    It has seen other images first. It gets the same weights, and its forward the same random
    numbers. True also where the second one cannot be built, and where the first gives other logits
    each time.
    """
    device = model.mean.device
    code = own_code[model.code]
    logits = []
    silence = contextlib.redirect_stdout(io.StringIO())
    with random_numbers_kept(device), buffers_kept(model), silence, contextlib.suppress(Exception):
        torch.manual_seed(secrets.randbits(32))
        net = imported_net(name, facts["classes"])
        other = Classifier(net, model.normalize, facts["mean"], facts["std"], foreign=True)
        other.code = name
        other.to(device).eval()
        x = torch.rand(2, *facts["shape"], device=device)
        with torch.no_grad():
            other(x)  # the sizes of lazy layers, too
            other.net.load_state_dict(model.net.state_dict())
            for network in (model, model, other):
                torch.manual_seed(0)
                logits.append(network(x).nan_to_num())
    own_code[model.code] = code
    if len(logits) < 3:
        return True
    first, again, second = logits
    bound = 1e-3 * first.abs().max()
    return bool((first - again).abs().max() > bound or (first - second).abs().max() <= bound)


@contextlib.contextmanager
def buffers_kept(model):
    """Put a network's buffers back on leaving: its forward may change them, or replace them."""
    before = [(module, name, buffer, buffer.detach().clone()) for module in model.modules()
              for name, buffer in module._buffers.items() if buffer is not None]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            module._buffers[name] = buffer
            if buffer.shape != value.shape:
                buffer.data = value
            elif not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def refuse_other_data(checkpoint, facts, path):
    """UsageError where a run was trained on other data or classes than `facts` say."""
    if not facts:
        return
    if facts["name"] != checkpoint["dataset"]:
        raise UsageError(f"{path}: was trained on {checkpoint['dataset']}, not on {facts['name']}")
    if facts["classes"] != checkpoint["num_classes"]:
        raise UsageError(f"{path}: has {checkpoint['num_classes']} classes, not "
                         f"{facts['classes']}")
    if facts["chosen"] != checkpoint["args"].get("classes"):
        raise UsageError(f"{path}: was trained with other --classes, or with the same ones in "
                         "another order")


def load_foreign(path, content, weights, device, facts, architecture, normalize):
    """As `load_model`, of weights that no run of ours wrote."""
    if not (architecture and facts):
        raise UsageError(f"{path} is a bare state_dict: --model and --dataset say what it belongs "
                         "to")
    if weights == "last":
        raise UsageError(f"{path} is a bare state_dict: it holds no last weights")
    model = build_model(architecture, facts, normalize, device).eval()
    load_weights(model, content, path)
    refuse_unsaved_values(model, architecture, facts, path)
    best = dict(epoch=None, state_dict=model.net.state_dict())
    flags = dict(eps=facts["eps"], classes=facts["chosen"])
    return model, dict(
        format=FORMAT, script="state_dict", model=architecture, dataset=facts["name"],
        num_classes=facts["classes"], input_shape=facts["shape"], mean=facts["mean"],
        std=facts["std"], normalize=normalize, args=flags, provenance=None, history=[], best=best,
        last=None)


def cpu_name():
    """The processor, and the vector instructions that PyTorch uses on it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()  # Linux
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    return f"CPU {name} ({torch.backends.cpu.get_cpu_capability()})"


def provenance(device):
    """What a number needs beside it: command, commit, hardware and versions, as plain values."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    size = ranks()[1]
    start = ["python"]
    if size > 1:
        start = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    threads = torch.get_num_threads()
    hardware = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    if size > 1:
        hardware = f"{size} x {hardware}"
    versions = dict(python=sys.version.split()[0], torch=str(torch.__version__),
                    numpy=np.__version__)
    command = shlex.join([*start, Path(sys.argv[0]).name, *map(str, sys.argv[1:])])
    return dict(command=command, commit=commit, hardware=hardware, versions=versions)


class Meter:
    """Means of named scalars over the images of an epoch, of all processes.

    The scalars gather on the device and are read every 50 steps. A value that is not finite then
    ends the run: UsageError with epoch, step and term.
    """

    def __init__(self, epoch):
        self.epoch = epoch
        self.names = []
        self.steps_read = 0
        self.rows = []
        self.sizes = []
        self.total = 0
        self.images = 0

    def add(self, size, terms):
        """terms: name -> scalar, a mean over `size` images; the same names at every step."""
        if self.names and self.names != list(terms):
            raise UsageError(f"the loss returned the terms {', '.join(terms)} after "
                             f"{', '.join(self.names)}: they must be the same at every step")
        self.names = list(terms)
        devices = [term.device for term in terms.values() if torch.is_tensor(term)]
        device = devices[0] if devices else "cpu"
        self.rows.append(torch.stack([torch.as_tensor(term, device=device).detach().float()
                                      for term in terms.values()]))
        self.sizes.append(size)
        if len(self.rows) == 50:
            self.gather()

    def gather(self):
        """Check and sum what has been added since the last time."""
        if not self.rows:
            return
        rows = torch.stack(self.rows).cpu().double()
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        broken = (~rows.isfinite()).nonzero()
        if len(broken):
            step, term = broken[0].tolist()
            raise UsageError(
                f"{self.names[term]} is {rows[step, term]:.0f} at epoch {self.epoch + 1}, step "
                f"{self.steps_read + step + 1}: the run ends{what_is_kept()} (a lower --lr?)")
        self.total = self.total + sizes @ rows
        self.images = self.images + sizes.sum()
        self.steps_read += len(rows)
        self.rows = []
        self.sizes = []

    def read(self):
        """name -> mean over all that was added; nothing where nothing was."""
        self.gather()
        if not self.names:
            return {}
        total = self.total
        images = self.images
        if ranks()[1] > 1:
            on_gpu = torch.distributed.get_backend() == "nccl"
            sums = torch.cat([total, images.view(1)]).to("cuda" if on_gpu else "cpu")
            sums = summed(sums).cpu()
            total = sums[:-1]
            images = sums[-1]
        return dict(zip(self.names, (total / images).tolist()))


def default_path(script, dataset):
    """Where a run is written without --ckpt; no two runs get the same."""
    now = time.strftime("%Y%m%d-%H%M%S")
    return f"runs/{script}-{dataset}-{now}-{secrets.token_hex(2)}.pt"


def going_on(path, resume):
    """Whether --resume finds a run to go on with."""
    return bool(resume and path) and Path(path).with_suffix(".resume.pt").exists()


def refuse_taken(path, resume, overwrite, others=(), earlier_paths=()):
    """UsageError where a file would be replaced without --overwrite or --resume.

    others: more files that the run will write. earlier_paths: runs of the phases before this one;
    --resume also goes on with one of them that is not finished.
    """
    path = Path(path)
    resume_path = path.with_suffix(".resume.pt")
    if overwrite or going_on(path, resume):
        return
    for earlier in earlier_paths:
        if going_on(earlier, resume):
            state = load_file(earlier.with_suffix(".resume.pt"))
            if not path.exists() or state["last"]["epoch"] < state["args"]["epochs"]:
                return
    if resume_path.exists():
        raise UsageError(f"{path} exists: --resume goes on with it, --overwrite replaces it")
    for file in (path, path.with_suffix(".jsonl"), *others):
        if file.exists():
            raise UsageError(f"{file} exists: --overwrite replaces it")


def claim(path):
    """The open PATH.lock that keeps a second run off `path` until it is closed.

    UsageError where another run holds it, or where the path cannot be written.
    """
    lock_path = Path(f"{path}.lock")
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(lock_path, "w")
        if fcntl:
            lock_file(lock)
            if os.fstat(lock.fileno()).st_ino != os.stat(lock_path).st_ino:
                raise BlockingIOError  # the run before removed the file as this one opened it
    except BlockingIOError:
        raise UsageError(f"--ckpt {path}: another run is writing it")
    except OSError as error:
        raise UsageError(f"--ckpt {path}: cannot be written ({error.strerror})")
    return lock


def lock_file(file):
    """Lock an open file, BlockingIOError where another process has it.

    Some network file systems have no locks: runs work there, unprotected.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def release(lock, new_folders):
    """Give up a claim: remove the lock, and the folders made for the run that are still empty."""
    with contextlib.suppress(OSError):
        os.unlink(lock.name)
        lock.close()
        for folder in new_folders:
            folder.rmdir()


class Run:
    """A training run on disk and in W&B.

    PATH.pt is there to be used, PATH.resume.pt to go on from, PATH.jsonl has a line per epoch.
    Under torchrun the first process writes; all of them read what an interrupted run left.
    """

    # what a resumed run may change
    FREE = ("ckpt", "resume", "overwrite", "keep_epochs", "data_dir", "device", "workers", "wandb",
            "precision")

    def __init__(self, script, flags, defaults, facts, precision, epochs_may_grow=False,
                 files=(), earlier_suffixes=()):
        """Claim the path and read what an interrupted run left; nothing is written yet.

        script: the script's __file__; a copy's runs carry the copy's name and source.
        flags, defaults, facts: of `parse_flags`. precision: of `set_up`.
        epochs_may_grow: whether a resumed run may have more --epochs, since no schedule depends
        on them. files: more files that the run will write. earlier_suffixes: such as .vanilla.pt,
        of the runs of earlier phases. UsageError where the path cannot be used, or the interrupted
        run had other flags.
        """
        self.script = Path(script).stem
        self.source = Path(script).read_text()
        self.path = Path(flags.ckpt or default_path(self.script, flags.dataset))
        self.resume_path = self.path.with_suffix(".resume.pt")
        self.log_path = self.path.with_suffix(".jsonl")
        self.facts = facts
        self.defaults = defaults
        self.config = dict(vars(flags), precision=precision, ckpt=str(self.path))
        self.history = []
        self.best = None
        self.wandb = None
        self.wandb_id = None
        self.provenance = None
        self.method_state = None  # what the method of an interrupted run kept
        self.best_by = None  # the column whose highest value makes the best epoch
        self.renamed = {}  # column -> its name in the terminal
        self.columns = None  # of the line that was printed last
        self.state = None
        self.epoch_paths = {epoch: self.path.with_suffix(f".e{epoch}.pt")
                            for epoch in flags.keep_epochs or ()}
        self.writes = ranks()[0] == 0
        if self.writes:
            files = [*files, *self.epoch_paths.values()]
            earlier_paths = [self.path.with_suffix(suffix) for suffix in earlier_suffixes]
            self.claim(files, earlier_paths)
        begun_runs.append(self.path)
        if going_on(self.path, flags.resume):
            self.state = load_file(self.resume_path)
            self.adopt(self.state, flags.precision, epochs_may_grow)
        self.precision = self.config["precision"]

    def claim(self, files, earlier_paths):
        """Keep other runs off the path until the run is closed, fails, or the process ends."""
        refuse_taken(self.path, self.config["resume"], self.config["overwrite"], files,
                     earlier_paths)
        if self.config["init"] and not going_on(self.path, self.config["resume"]):
            holds_weights(self.config["init"])  # a wrong name must not cost the old run
        new_folders = [folder for folder in self.path.parents if not folder.exists()]
        lock = claim(self.path)
        self.unlock = weakref.finalize(self, release, lock, new_folders)
        if self.config["overwrite"]:
            # Were the new run interrupted, --resume must not revive the old one.
            self.resume_path.unlink(missing_ok=True)

    def adopt(self, state, precision, epochs_may_grow):
        """Take over an interrupted run's history, after checking that it is this run.

        precision: the flag; "auto" keeps what the run began with.
        """
        try:
            old = dict(state["args"], script=state["script"])
            self.history = state["history"]
            self.best = state["best"]
            self.wandb_id = state["wandb_id"]
            self.method_state = state["method_state"]
            known = state["format"] == FORMAT
            self.provenance = state["provenance"]  # of the command that started the run
        except (KeyError, TypeError):
            raise UsageError(f"{self.resume_path}: is not what an interrupted run leaves")
        if not known:
            raise UsageError(f"{self.resume_path}: has format {state['format']}, this code reads "
                             f"{FORMAT}")
        new = dict(self.config, script=self.script)
        if precision == "auto":
            self.config["precision"] = old["precision"]
        elif old["precision"] != new["precision"]:
            raise UsageError(f"{self.resume_path} was begun with --precision {old['precision']}")
        if epochs_may_grow and new["epochs"] > old["epochs"]:
            old["epochs"] = new["epochs"]
        differ = []
        for name in new.keys() - set(self.FREE):
            before = old.get(name, self.defaults.get(name))  # a flag that is newer than the run
            if before != new[name]:
                differ.append(f"{name.replace('_', '-')} was {shown(before)}, is "
                              f"{shown(new[name])}")
        if any(text.startswith("epochs ") for text in differ) and not epochs_may_grow:
            differ.append("the schedule depends on --epochs")
        if differ:
            raise UsageError(f"{self.resume_path} is of a run with other flags: "
                             f"{'; '.join(sorted(differ))}")
        if state.get("source", self.source) != self.source:
            print(f"{self.script}.py has changed since this run began")

    def start(self, model, optimizer, best_by=None):
        """Load the interrupted run, if there is one, or --init; returns the next epoch, from 0.

        best_by: the column of an epoch's row whose highest value makes the best epoch. Where a row
        lacks it, or it is None, the last epoch is the best.
        """
        device = next(model.parameters()).device
        self.best_by = best_by
        first = 0
        if self.state:
            first = self.continue_from(self.state, model, optimizer)
            self.state = None
        elif self.config["init"]:
            load_init(model, self.config["init"])
        found = summed(torch.tensor([first], device=device)).item()
        if found != first * ranks()[1]:
            raise UsageError(f"--resume: not every process finds {self.resume_path}, put it where "
                             "all of them do")
        if self.provenance is None:
            self.provenance = provenance(device)
        if self.writes:
            config = dict(self.config, script=self.script, source=self.source)
            self.wandb = wandb_run(config, self.script, self.path, self.wandb_id)
        self.began = time.monotonic()
        self.first = first
        return first

    def continue_from(self, state, model, optimizer):
        """Load an interrupted run's weights and optimiser; returns the next epoch, from 0."""
        load_weights(model, state["last"]["state_dict"], self.resume_path)
        optimizer.load_state_dict(state["optimizer"])
        if self.writes and not self.path.exists():
            saved = {name: value for name, value in state.items() if name != "optimizer"}
            write_beside(self.path, lambda file: torch.save(saved, file))
        epoch = state["last"]["epoch"]
        if epoch >= self.config["epochs"]:
            print(f"{self.path}: is finished")
        else:
            print(f"{self.path}: goes on after epoch {epoch}")
        for kept, path in self.epoch_paths.items():
            if kept <= epoch and not path.exists():
                print(f"{path}: cannot be written, epoch {kept} is over")
        return epoch

    def tell(self, reads, train, val, attacks, renamed=None):
        """Print what runs, and what the columns of the table below are.

        reads: the flags that the method reads, see `flags_read`. train, val: the Splits. attacks:
        the text on the columns of accuracies under attack. renamed: column -> its name in the
        terminal, where that is not the one in run.jsonl.
        """
        self.renamed = renamed or {}
        config = self.config
        lines = [f"{self.script} --method {config['method']} on {config['dataset']}, "
                 f"{config['model']}: {len(train.labels):,} training and {len(val.labels):,} "
                 "validation images",
                 self.told_flags(reads),
                 f"trains in {self.precision} on {self.provenance['hardware']}; writes "
                 f"{self.path}, {self.log_path.name} (this log) and {self.resume_path.name} (for "
                 "--resume)"]
        others = "columns"
        if len(val.labels):
            others = "the others"
            lines.append("columns with %: accuracy on the validation images (chance: "
                         f"{100 / self.facts['classes']:.3g} %); {attacks}")
        lines.append(f"{others}: lr of the epoch's last step; means of the loss and its terms; "
                     "seconds of training alone; left: until the end")
        for line in lines:
            print(textwrap.fill(line, 100, subsequent_indent="  ", break_long_words=False,
                                break_on_hyphens=False), flush=True)

    def told_flags(self, reads):
        """The flags that define the run, and all that differ from their defaults, as one line.

        Where there is no room for all, those of the method that are at their defaults give way.
        """
        main = ["eps", "epochs", "batch_size", "lr"]
        elsewhere = ["ckpt", "resume", "overwrite", "precision", "dataset", "model", "method"]
        own = []
        changed = []
        for name, value in self.config.items():
            if name in main or name in elsewhere:
                continue
            if value != self.defaults.get(name, value):
                changed.append(name)
            elif name in reads and type(value) in (int, float) and value:
                own.append(name)
        while True:
            told = [self.flag_text(name) for name in main + own + changed]
            line = "flags: " + " ".join(told)
            if len(line) <= 100 or not own:
                return line
            own.pop()

    def flag_text(self, name):
        """A flag with its value, as on the command line."""
        flag = f"--{name.replace('_', '-')}"
        value = self.config[name]
        return flag if value is True else f"{flag} {shown(value)}"

    def finish_epoch(self, model, optimizer, row, method_state=None, histograms=None):
        """Keep the best weights, save, log and print an epoch.

        row: name -> number, with "epoch" counted from 1. run.resume.pt alone suffices to go on; it
        is written last. histograms: name -> tensor, for W&B.
        """
        self.history.append(row)
        metric = row.get(self.best_by)
        state = copy_of_weights(model.net)
        tensors = [value for value in state.values() if torch.is_tensor(value)]
        if not all(value.isfinite().all() for value in tensors):
            raise UsageError(f"weights are no longer finite after epoch {row['epoch']}: the run "
                             f"ends{what_is_kept()} (a lower --lr?)")
        last = dict(epoch=row["epoch"], state_dict=state)
        if metric is None or self.best is None or metric > self.best["metric"]:
            self.best = dict(last, metric=metric)
        if self.writes:
            self.save(last, metric, method_state, optimizer)
            self.log(row, histograms or {})
            self.print_epoch(row)

    def save(self, last, metric, method_state, optimizer):
        """Write run.pt, run.jsonl, what --keep-epochs asks for and run.resume.pt, in this order."""
        config = self.config
        facts = self.facts
        saved = dict(
            format=FORMAT, script=self.script, source=self.source, model=config["model"],
            dataset=config["dataset"], num_classes=facts["classes"], input_shape=facts["shape"],
            mean=facts["mean"], std=facts["std"], normalize=config["normalize"], args=config,
            provenance=self.provenance, history=self.history, method_state=method_state,
            wandb_id=self.wandb.id if self.wandb else self.wandb_id, best=self.best, last=last)
        write_beside(self.path, lambda file: torch.save(saved, file))
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        write_beside(self.log_path, lambda file: file.write(lines.encode()))
        if last["epoch"] in self.epoch_paths:
            kept = dict(saved, best=dict(last, metric=metric))
            write_beside(self.epoch_paths[last["epoch"]], lambda file: torch.save(kept, file))
        everything = dict(saved, optimizer=optimizer.state_dict())
        write_beside(self.resume_path, lambda file: torch.save(everything, file))
        saved_files.append(self.path)

    def keep_last(self, path):
        """Copy run.pt to `path`, with the network after the last epoch as the best one.

        Where run.pt is newer than what a resumed run goes on from, the copy was already made.
        """
        if not self.writes:
            return
        checkpoint = load_checkpoint(self.path)
        epoch = self.history[-1]["epoch"]
        if checkpoint["last"]["epoch"] == epoch:
            metric = self.history[-1].get("val/robust")
            checkpoint["best"] = dict(checkpoint["last"], metric=metric)
            write_beside(path, lambda file: torch.save(checkpoint, file))

    def log(self, row, histograms):
        """Send an epoch to W&B; what fails there does not stop the run."""
        if not self.wandb:
            return
        try:
            import wandb
            drawn = {name: wandb.Histogram(values.cpu().numpy())
                     for name, values in histograms.items()}
            self.wandb.log(row | drawn)
        except Exception as error:
            print(f"W&B failed, logging to local files only: {error}")
            self.wandb = None

    def print_epoch(self, row):
        """One aligned line: accuracies in %, and the time that is left."""
        epochs = self.config["epochs"]
        done = row["epoch"] - self.first
        left = (epochs - row["epoch"]) * (time.monotonic() - self.began) / done
        cells = epoch_cells(row, epochs, self.config["eps"], self.renamed)
        cells["left"] = duration(left)
        widths = {name: max(8, len(name)) for name in cells}
        if row["epoch"] % 10 == 1 or list(cells) != self.columns:
            print(" ".join(f"{name:>{widths[name]}}" for name in cells))
        print(" ".join(f"{cell:>{widths[name]}}" for name, cell in cells.items()), flush=True)
        self.columns = list(cells)
        chance = 1 / self.facts["classes"]
        if row["epoch"] == 1 and row.get("val/clean", 1.0) < chance + 0.05:
            print(f"  clean % is near chance, {100 * chance:.3g}: common after one epoch, not "
                  "after several")

    def close(self):
        """End the W&B run, release the path, and say how to evaluate the run."""
        best = self.best["epoch"]
        if self.wandb:
            values = {f"best/{name}": value for name, value in self.history[best - 1].items()}
            try:
                self.wandb.summary.update(values)
                self.wandb.finish()
            except Exception as error:
                print(f"W&B failed: {error}")
        with first_process_first():  # the others may open what it wrote
            if self.writes:
                self.unlock()
        last = self.history[-1]["epoch"]
        if self.best_by in self.history[best - 1]:
            column = self.renamed.get(self.best_by, self.best_by.rpartition("/")[2])
            other = f" (--weights last: epoch {last}'s)" if last > best else ""
            print(f"the best epoch is {best}, by {column} %; evaluate.py takes its weights{other}:")
        else:
            print(f"evaluate.py takes the weights of the last epoch, {last}:")
        command = ["python", "evaluate.py", "--ckpt", str(self.path)]
        if ".py:" in self.config["model"]:
            command += ["--model", self.config["model"]]
        if self.config["data_dir"] != "data":
            command += ["--data-dir", str(self.config["data_dir"])]
        print(f"  {shlex.join(command)}")


def duration(seconds):
    """A time as text: 45 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def epoch_cells(row, epochs, eps, renamed, columns=91):
    """What the terminal shows of an epoch's row: column -> text, at most so many columns wide.

    Accuracies, val/..., are in %, radii in the unit of --eps, `eps`. renamed: column -> its name
    here. Of the other groups only the training terms are shown, the first of them where there is no
    room for all. Everything is in run.jsonl and in W&B.
    """
    cells = {}
    terms = []
    for name, value in row.items():
        group, _, short = name.rpartition("/")
        short = renamed.get(name, short)
        if name == "epoch":
            cells[name] = f"{value}/{epochs}"
        elif name == "eps":
            cells[name] = in_unit_of(value, eps)
        elif group == "val":
            cells[f"{short} %"] = f"{100 * value:.1f}"
        elif group in ("", "train"):
            cells[short] = f"{value:.4g}"
            if group == "train":
                terms.append(short)
    while len(terms) > 1 and sum(max(8, len(name)) + 1 for name in cells) > columns:
        del cells[terms.pop()]
    return cells


def wandb_run(config, script, path, run_id=None):
    """A W&B run, or None. It never asks and never stops a run.

    What fails costs one line and continues offline. WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY,
    WANDB_RUN_GROUP and WANDB_DIR of the environment win. Runs that differ in their seed alone, or
    in other settings of one method, are in one group.
    """
    mode = os.environ.get("WANDB_MODE") or config["wandb"]
    if mode == "disabled":
        return None
    try:
        import wandb
    except Exception as error:
        print(f"wandb is not installed, logging to local files only ({error})")
        return None
    if mode in ("auto", "online"):
        has_key = wandb_key_is_configured()
        if mode == "online" and not has_key:
            print("W&B: no key is configured (wandb login), logging offline")
        mode = "online" if has_key else "offline"
    folder = os.environ.get("WANDB_DIR") or path.parent
    project = os.environ.get("WANDB_PROJECT") or "cleanat"
    parts = [script, config.get("dataset"), config.get("method")]
    group = os.environ.get("WANDB_RUN_GROUP") or "-".join(part for part in parts if part)
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            settings = wandb.Settings(silent=True, init_timeout=20)
            run = wandb.init(project=project, name=f"{script}-{path.stem}", config=config,
                             group=group, id=run_id, resume="allow", mode=attempt, dir=folder,
                             settings=settings)
            run.define_metric("epoch")
            run.define_metric("*", step_metric="epoch")
            where = getattr(run, "url", None) or f"{folder}/wandb, offline"
            print(f"W&B: {where}")
            return run
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            print(f"W&B {attempt} failed: {reason}")
    return None


def wandb_key_is_configured():
    """Whether WANDB_API_KEY or ~/.netrc has a key, as `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        found = netrc(os.environ.get("NETRC")).authenticators(urlparse(address).hostname)
    except (OSError, NetrcParseError):
        return False
    return bool(found)
