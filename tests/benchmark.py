"""How fast the project is: bare passes, every method's step, PGD beside foolbox, memory, input.

    python tests/benchmark.py --quick               # under two minutes on two CPU cores
    python tests/benchmark.py --json speed.json     # all of it, on the GPU where there is one

A ratio compares medians of one run, in which what is compared took turns. needs: the passes that
a method's mathematics asks for, in forward passes of a batch: a forward pass is 1, an input
gradient 2, a training pass 3, and a training pass whose loss holds an input gradient 6.
"""

import argparse
import ctypes
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import foolbox
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import atlas
import common
import dra_finetune
import evaluate
import iaat
import sat_rx
import teacher_saliency
from speed import cell, ratio

WEIGHTS = (1, 2, 3, 6)  # of a forward pass, an input gradient, a training pass, one with both
QUICK = ("nt", "pgd-at-7", "adv", "atlas")  # the methods on WRN-16-2 with --quick


# ------------------------------------------------------------------------------------ the methods

def methods(model, other, facts):
    """name -> ((forwards, input gradients, training passes, double backwards), loss of (x, y)).

    The passes are those of a batch that the method needs, a function of the returned terms where
    they depend on the batch. model is trained; other, a network of the same kind, is the source of
    EAT and the teacher of the saliency maps. facts: the data set's.
    """
    eps = facts["eps"]
    step = eps / 4
    k = 7
    judges = [teacher_saliency.Discriminator(*facts["shape"]) for _ in range(2)]
    judges = [judge.to(model.mean.device).requires_grad_(False) for judge in judges]

    def dual(x, y):
        return dra_finetune.dual_loss(model, x, y, eps, "dra", k, 0.1, x.new_ones(()),
                                      x.new_ones(()), 0.1)

    def memory(x):
        return torch.full_like(x[:, 0, 0, 0], eps)

    def iaat_counts(terms):
        """Of what it did: only images that are classified correctly are attacked."""
        right = terms["right"].item()
        attacks = (float(terms["passes"]) - 4 / 3 - right * k) / (k + 1 / 3)  # that choose eps
        return 1 + attacks, k * (right + attacks), 1, 0
    return {
        "nt": ((0, 0, 1, 0), lambda x, y: sat_rx.nt_loss(model, x, y)),
        "fgsm-at": ((0, 0.5, 1, 0), lambda x, y: sat_rx.fgsm_at_loss(model, x, y, eps)),
        "fgsm-at-random": ((0, 0.5, 1, 0),
                           lambda x, y: sat_rx.fgsm_at_loss(model, x, y, eps, True)),
        "eat": ((0, 0.5, 1, 0), lambda x, y: sat_rx.eat_loss(model, [other], x, y, eps)),
        "rfgsm-at": ((0, 1, 1, 0), lambda x, y: sat_rx.rfgsm_at_loss(model, x, y, eps, eps / 2)),
        "pgd-at-7": ((0, k, 1, 0), lambda x, y: sat_rx.pgd_at_loss(model, x, y, eps, step, k)),
        "trades-7": ((1, k, 2, 0), lambda x, y: sat_rx.trades_loss(model, x, y, eps, 6, step, k)),
        "r1": ((0, 1, 1, 0), lambda x, y: sat_rx.r1_loss(model, x, y, eps, 1.0, k)),  # + a chain
        "r2": ((0, 2, 2, 0), lambda x, y: sat_rx.r2_loss(model, x, y, eps, 1.0, eps / 2)),
        "r3": ((0, 1, 2, 0), lambda x, y: sat_rx.r3_loss(model, x, y, eps, 1.0, eps / 2, 0.5)),
        "adv": ((0, 1, 1, 0), lambda x, y: atlas.adv_loss(
            model, atlas.attack(model, x, y, eps, 1, step), y)),
        "atlas": ((0, 1, 1, 1), lambda x, y: atlas.atlas_loss(
            model, x, atlas.attack(model, x, y, eps, 1, step), y, 2e-4, 5.0)),
        "jac": ((0, 0, 0, 1), lambda x, y: atlas.jac_loss(model, x, y, 0.5)),
        "trades-1": ((1, 1, 2, 0), lambda x, y: atlas.trades_loss(
            model, x, atlas.kl_attack(model, x, eps, 1, step), y, 2.0)),
        "tradesjac": ((1, 1, 1, 1), lambda x, y: atlas.tradesjac_loss(
            model, x, atlas.kl_attack(model, x, eps, 1, step), y, 2e-4, 0.5)),
        "iaat-warm": (iaat_counts, lambda x, y: iaat.iaat_loss(
            model, x, y, memory(x), True, eps, step, 0.1, 0.0, "paper", step, k, k)),
        "iaat": (iaat_counts, lambda x, y: iaat.iaat_loss(
            model, x, y, memory(x), False, eps, step, 0.1, 0.0, "paper", step, k, k)),
        "line-search": (iaat_counts, lambda x, y: iaat.line_search_loss(
            model, x, y, memory(x), False, eps, eps, 0.0, "largest", step, k, k)),
        "mixup": ((0, k, 1, 0), lambda x, y: iaat.mixup_loss(model, x, y, eps, step, k)),
        "dra": ((0, k, 1, 0), lambda x, y: dra_finetune.adversarial_loss(
            model, x, y, eps, "dra", k, 0.1)),
        "dra-dual": ((0, k, 2, 0), dual),
        "dra-trades": ((1, k, 2, 0), lambda x, y: dra_finetune.trades_loss(
            model, x, y, eps, 6, "dra", k, 0.1)),
        "align": ((0, 1, 0, 1), lambda x, y: teacher_saliency.align_loss(
            model, other, judges[0], x, y, 2.0, 10.0, "prob", "image")[0]),
        "curriculum": ((0, 1, 0, 1.5), lambda x, y: teacher_saliency.curriculum_loss(
            model, other, *judges, x, y, 50, 2.0, 10.0, "prob", "image", "negated")[0]),
    }


# -------------------------------------------------------------------------------------- measuring

def wait(device):
    """Until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(functions, repeats, device, clock):
    """name -> median of the milliseconds of a call. All take turns, after a call that warms up.

    clock: time.perf_counter, or time.process_time, which other programs disturb less.
    """
    taken = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            wait(device)
            began = clock()
            function()
            wait(device)
            if turn:
                taken[name].append(1000 * (clock() - began))
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_mebibytes(function, device):
    """How much memory a call adds at its highest. None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # Linux: give back what is free,
        Path("/proc/self/clear_refs").write_text("5")  # and forget the highest so far
    except (OSError, AttributeError):
        return None
    before = status_kibibytes("VmRSS")
    function()
    return (status_kibibytes("VmHWM") - before) / 1024


def status_kibibytes(name):
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line, = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1])


class Counter(TorchDispatchMode):
    """Inside it `total` grows by the operations of every convolution and product."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def operations(function):
    """(floating-point operations of a call's convolutions and products, what it returns)."""
    with Counter() as counter:
        result = function()
    return counter.total, result


def show(title, rows):
    """Print rows, dictionaries with the same keys, as an aligned table."""
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [columns] + [[cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        first, *rest = [text.rjust(width) for text, width in zip(line, widths)]
        print(first.strip().ljust(widths[0]), *rest, sep="  ")
    sys.stdout.flush()


# ------------------------------------------------------------------------------- what is measured

def network_and_batch(name, batch, device):
    """(facts, two networks in train and in eval mode, images, labels), all of fixed seeds."""
    facts = common.dataset_facts("mnist" if name == "lenet+" else "cifar10")
    common.seed_stream(0, "benchmark")
    model = common.build_model(name, facts, device=device).train()
    other = common.build_model(name, facts, device=device).eval().requires_grad_(False)
    pixels = torch.randint(0, 256, (batch, *facts["shape"]), dtype=torch.uint8)
    y = torch.randint(0, facts["classes"], (batch,))
    return facts, model, other, common.to_float(pixels.to(device)), y.to(device)


def bare_passes(model, x, y):
    """The four passes by PyTorch alone; the last one is as JAC uses it."""
    def forward():
        with torch.no_grad():
            model(x)

    def double():
        atlas.jac_loss(model, x, y, 0.5)["loss"].backward()
    return {
        "forward": forward,
        "input gradient": lambda: common.input_gradient(model, x, y),
        "training pass": lambda: common.cross_entropy(model(x), y).mean().backward(),
        "double backward": double}


def measure_network(name, batch, precision, wanted, args, device):
    """Tables of the bare passes and of the methods' steps; `wanted`: their names, None for all."""
    facts, model, other, x, y = network_and_batch(name, batch, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    losses = methods(model, other, facts)
    losses = {key: value for key, value in losses.items() if wanted is None or key in wanted}

    def in_precision(function):
        def call():
            with common.autocast(device, precision):
                return function()
        return call

    def step(loss):
        def call():
            with common.autocast(device, precision):
                terms = loss(x, y)
            common.update(optimizer, terms["loss"], len(x))
            return terms
        return call
    passes = {key: in_precision(call) for key, call in bare_passes(model, x, y).items()}
    steps = {key: step(loss) for key, (_, loss) in losses.items()}
    ms = milliseconds({**passes, **steps}, args.repeats, device, args.clock)
    of_forward, _ = operations(passes["forward"])
    title = f"{name}, batch {batch}, {precision}"
    bare = []
    for key, weight in zip(passes, WEIGHTS):
        bare.append({"pass": key, "ms": ms[key], "needs": weight,
                     "in forward passes": ms[key] / ms["forward"],
                     "counted": operations(passes[key])[0] / of_forward,
                     "MiB": peak_mebibytes(passes[key], device)})
    show(f"{title}: bare passes", bare)
    rows = []
    for key, (counts, _) in losses.items():
        counted, terms = operations(steps[key])
        counts = counts(terms) if callable(counts) else counts
        needs = sum(n * weight for n, weight in zip(counts, WEIGHTS))
        ideal = sum(n * ms[name] for n, name in zip(counts, passes))
        rows.append({"method": key, "ms": ms[key], "of its bare passes": ms[key] / ideal,
                     "needs": float(needs), "in forward passes": ms[key] / ms["forward"],
                     "counted": counted / of_forward,
                     "MiB": peak_mebibytes(steps[key], device)})
    show(f"{title}: steps", rows)
    measured = dict(network=name, batch=batch, precision=precision, passes=bare, steps=rows)
    if ratio(measured):
        print(f"ATLAS / one-step ADV: {ratio(measured):.2f}")
    return measured


def trained_network(device):
    """(facts, LeNet+ after some R-FGSM training on the digits, its test images)."""
    facts = common.dataset_facts("digits")
    train, _ = common.load_train(facts, "data", 0, None, device)
    common.seed_stream(0, "benchmark")
    model = common.build_model("lenet+", facts, device=device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    for epoch in range(4):
        for x, y, _ in common.train_batches(train, 64, 0, epoch):
            loss = sat_rx.rfgsm_at_loss(model, x, y, 0.1, 0.05)["loss"]
            common.update(optimizer, loss, len(x))
    model.eval()  # its weights ask for gradients, as a loaded network's do: foolbox makes them, too
    return facts, model, common.load_split(facts, "data", "test", device)


def measure_attacks(args, device):
    """PGD-20 alone and with 5 restarts, beside foolbox's at equal eps, step, and starts.

    The network is as a user loads it. With frozen weights foolbox makes no gradients for them, and
    in float32 both are equally fast.
    """
    facts, model, test = trained_network(device)
    if args.quick:
        test = test.take(torch.arange(120, device=device))
    eps = 0.14
    restarts = 5
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
    oracle = foolbox.attacks.LinfPGD(rel_stepsize=0.1, steps=20)
    x = common.to_float(test.images)
    y = test.labels
    found = {}

    def ours(precision):
        with common.autocast(device, precision):
            x_adv = common.pgd(model, x, y, eps, 0.1 * eps, 20)
        with torch.no_grad():
            found[f"pgd, {precision}"] = (model(x_adv).argmax(1) == y).float().mean()

    def evaluated(precision):
        attack, = evaluate.parse_attacks(f"pgd-20x{restarts}", facts, eps, step=0.1 * eps)
        flags = evaluate.evaluate(model, test, attack, len(y), precision)[:, 0]
        found[f"restarts, {precision}"] = torch.as_tensor(flags.mean())

    def theirs(name, attack):
        _, _, success = attack(bounded, x, y, epsilons=eps)
        found[name] = 1 - success.float().mean()
    calls = {"pgd, foolbox": lambda: theirs("pgd, foolbox", oracle),
             "restarts, foolbox": lambda: theirs("restarts, foolbox", oracle.repeat(restarts))}
    for precision in ("float32", "bfloat16"):
        calls[f"pgd, {precision}"] = lambda precision=precision: ours(precision)
        calls[f"restarts, {precision}"] = lambda precision=precision: evaluated(precision)
    ms = milliseconds(calls, max(1, args.repeats // 3), device, args.clock)
    rows = []
    for key in sorted(calls):
        kind = key.partition(",")[0]
        rows.append({"attack": key, "images/s": 1000 * len(y) / ms[key],
                     "of foolbox": ms[f"{kind}, foolbox"] / ms[key],
                     "accuracy %": 100 * found[key].item()})
    show(f"LeNet+ on {len(y)} digits, eps {eps}, 20 steps", rows)
    return rows


def measure_input(args, device, batch=128):
    """A batch's way to the network, of images held in memory, beside a normal training step."""
    facts, model, _, x, y = network_and_batch("wrn-16-2", batch, device)
    pixels = torch.randint(0, 256, (20 * batch, *facts["shape"]), dtype=torch.uint8).to(device)
    labels = torch.zeros(len(pixels), dtype=torch.int64, device=device)
    split = common.Split(pixels, labels, torch.arange(len(pixels), device=device))

    def batches():
        for _ in common.train_batches(split, batch, 0, 0, "crop-flip"):
            pass
    calls = {"20 batches": batches,
             "a step": lambda: common.cross_entropy(model(x), y).mean().backward()}
    ms = milliseconds(calls, args.repeats, device, args.clock)
    each = ms["20 batches"] / 20
    row = {"input": "crop-flip, CIFAR-10", "ms a batch": each, "ms a step": ms["a step"],
           "share %": 100 * each / (each + ms["a step"])}
    show(f"input, batch {batch}, beside WRN-16-2's training pass", [row])
    return row


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer networks, methods and repeats")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument("--repeats", type=int, help="of which the median counts (9; quick: 3)")
    parser.add_argument("--batch-size", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor "
                        "time, where others share the cores; one thread then (%(default)s)")
    parser.add_argument("--json", metavar="PATH", help="write the numbers there, too")
    args = parser.parse_args()
    args.repeats = args.repeats or (3 if args.quick else 9)
    if args.clock == "cpu":  # threads that wait for others take processor time, too
        torch.set_num_threads(1)
    args.clock = time.process_time if args.clock == "cpu" else time.perf_counter
    return args


def main():
    args = parse()
    began = time.perf_counter()
    device, _ = common.set_up(args.device, "float32")
    hardware = common.provenance(device)["hardware"]
    print(f"{hardware}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
          f"medians of {args.repeats}")
    small = min(32, args.batch_size) if args.quick else args.batch_size
    plan = [("lenet+", small), ("wrn-16-2", small)]
    if device.type == "cuda" and not args.quick:
        plan += [("resnet18", args.batch_size), ("wrn-28-8", 64)]
    networks = []
    for name, batch in plan:
        for precision in ("float32", "bfloat16"):
            all_methods = name == "lenet+" and precision == "float32"
            wanted = None if all_methods or not args.quick else QUICK
            networks.append(measure_network(name, batch, precision, wanted, args, device))
    found = dict(common.provenance(device), repeats=args.repeats, networks=networks,
                 attacks=measure_attacks(args, device), input=measure_input(args, device, small))
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"\nhighest memory of the process: {peak:.0f} MiB")
        found["peak_MiB"] = peak
    print(f"{time.perf_counter() - began:.0f} s")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
