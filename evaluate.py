"""How robust is a checkpoint? Attacks by name on the test set, a table, and a record of every outcome.

    python evaluate.py --ckpt run.pt                                    # a quick look: 1,000 random test images
    python evaluate.py --ckpt run.pt --limit 0 --attacks clean,fgsm,pgd-100x5,pgd-cw-100,mi-fgsm-100
    python evaluate.py --ckpt run.pt --protocol sat_rx --surrogate c.pt --surrogate d.pt     # a paper's own columns

NAME-STEPSxRESTARTS names an attack. White-box iterative attacks count a sample as broken at the first step that
misclassifies it and attack it no further: never weaker than judging the last step alone. Evaluation is in float32, TF32
off, unless told otherwise. Outcomes go to run.eval.json, per-sample flags to run.eval.npz, both under the sha256 of the
weights they belong to, so that nothing of an earlier network on the same path remains.
"""

import hashlib
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common

QUICK_LOOK = dict(attacks="clean,fgsm,ifgsm-40,pgd-40,pgd-cw-40", transfer="fgsm,mi-fgsm-40", start="ball", limit=1000)
SAT_RX = dict(start="step", limit=0)  # section 5.1: the whole test set; eq. 6: PGD starts within a step of x
PROTOCOLS = {  # the columns of the papers' main tables; their rows are in results/papers.json
    "sat_rx": {
        "mnist": dict(SAT_RX, attacks="clean,fgsm,ifgsm-100,pgd-100,pgd-cw-100", transfer="fgsm,mi-fgsm-100"),
        "cifar10": dict(SAT_RX, attacks="clean,fgsm,ifgsm-20,pgd-20,pgd-cw-20", transfer="fgsm,mi-fgsm-20"),
    },
}


def parse(argv=None):
    """The flags; argv as in argparse."""
    parser = common.Parser(__doc__)
    flag = parser.add_argument
    flag("--ckpt", required=True, help="the checkpoint that training wrote")
    flag("--weights", choices=["best", "last"], default="best", help="which weights of it (%(default)s)")
    flag("--attacks", help=f"comma-separated: {ATTACK_NAMES} ({QUICK_LOOK['attacks']})")
    flag("--protocol", choices=list(PROTOCOLS), help="the columns of this paper's main table, its rows beside them")
    flag("--surrogate", metavar="CKPT", action="append", default=[], help="also attack by transfer from this network; "
         "may be repeated")
    flag("--transfer", help=f"the attacks made on surrogates ({QUICK_LOOK['transfer']}; with --protocol the paper's)")
    flag("--eps", type=common.unit, help="L-infinity radius in [0, 1] units, 8/255 or 0.031 (that of training)")
    flag("--step-size", type=common.unit, help="step of PGD in [0, 1] units (the data set's usual one in proportion to "
         "eps, and at least 1.25 eps / steps)")
    flag("--start", choices=["ball", "step"], help="PGD starts uniformly in the eps-ball or within a step of x "
         f"({QUICK_LOOK['start']}; with --protocol the paper's)")
    flag("--limit", type=common.natural, help="evaluate a fixed random subset of N test images; 0: all "
         f"({QUICK_LOOK['limit']}; with --protocol the paper's)")
    flag("--data-dir", default="data", help="folder that holds NAME.npz (%(default)s)")
    flag("--batch-size", type=common.count, default=250, help="images attacked at once (%(default)s)")
    flag("--seed", type=common.natural, default=0, help="seed of the random starts (%(default)s)")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (%(default)s)")
    flag("--precision", choices=["float32", "bfloat16"], default="float32", help="of evaluation (%(default)s)")
    flag("--results", metavar="FILE.json", help="also write the outcomes with training command, commit, hardware, "
         "minutes and history")
    flag("--export", metavar="FILE.pt", help="write the weights as a float16 checkpoint and stop")
    flag("--overwrite", action="store_true", help="replace the files of --results and --export")
    common.wandb_flag(parser)
    args = parser.parse_args(argv)
    if args.protocol and args.attacks:
        raise common.UsageError("--protocol names the attacks itself: give it or --attacks")
    stem = Path(args.ckpt).parent / Path(args.ckpt).stem
    own = [Path(f"{stem}{end}").resolve() for end in (".pt", ".resume.pt", ".jsonl", ".eval.json", ".eval.npz")]
    for path in (args.results, args.export):  # before an hour of attacks, not after it
        if path and Path(path).resolve() in own:
            raise common.UsageError(f"{path} belongs to --ckpt {args.ckpt}: choose another name")
        if path and not Path(path).parent.is_dir():
            raise common.UsageError(f"{path}: there is no such folder")
        if path and Path(path).exists() and not args.overwrite:
            raise common.UsageError(f"{path} exists: --overwrite replaces it")
    return args


# --------------------------------------------------------------------------------------------------------- attacks

class Attack(NamedTuple):
    """An attack with its budget: eps and step in [0, 1] units, None where the attack has none."""
    name: str
    kind: str
    eps: float | None
    step: float | None
    steps: int | None
    restarts: int
    start: str | None


def run_pgd(model, x, y, a, stop, loss):
    """PGD with `loss` from the ball, or from within a step of x (SAT-Rx eq. 6)."""
    def near(x, eps):
        return common.uniform_start(x, a.step)
    start = common.uniform_start if a.start == "ball" else near
    return common.pgd(model, x, y, a.eps, a.step, a.steps, start, loss=loss, restarts=a.restarts, stop_broken=stop)


ATTACKS = {  # kind -> function (model, x, y, attack, stop_broken) -> perturbed images
    "clean": lambda model, x, y, a, stop: x,
    "fgsm": lambda model, x, y, a, stop: common.fgsm(model, x, y, a.eps),
    "ifgsm": lambda model, x, y, a, stop: common.ifgsm(model, x, y, a.eps, a.steps, stop_broken=stop),
    "mi-fgsm": lambda model, x, y, a, stop: common.mi_fgsm(model, x, y, a.eps, a.steps, stop_broken=stop),
    "pgd": lambda model, x, y, a, stop: run_pgd(model, x, y, a, stop, common.cross_entropy),
    "pgd-cw": lambda model, x, y, a, stop: run_pgd(model, x, y, a, stop, common.margin),
}
ATTACK_NAMES = "clean, fgsm, ifgsm-STEPS, mi-fgsm-STEPS, pgd-STEPS, pgd-cw-STEPS; xRESTARTS may follow pgd and pgd-cw"


def parse_attacks(text, dataset, eps, step=None, start="ball"):
    """The attacks of a comma-separated list, each once; UsageError for a name that is none.

    IFGSM and MI-FGSM step by eps / steps. PGD's default step is the data set's usual one (0.01 at eps 0.3 on MNIST,
    2/255 at 8/255 on CIFAR) in proportion to eps, and at least 1.25 eps / steps so that few steps can leave the start.
    """
    attacks, facts = [], common.DATASETS[dataset]
    for name in dict.fromkeys(word.strip() for word in text.split(",")):
        match = re.fullmatch(r"([a-z-]+?)(?:-([1-9]\d*))?(?:x([1-9]\d*))?", name)
        kind, steps, restarts = match.groups() if match else (None, None, None)
        iterative, random = kind not in ("clean", "fgsm"), kind in ("pgd", "pgd-cw")
        if kind not in ATTACKS or bool(steps) != iterative or (restarts and not random):
            raise common.UsageError(f"{name!r} is no attack: choose from {ATTACK_NAMES}")
        steps = int(steps) if steps else None
        pgd_step = step or max(facts["step"] * eps / facts["eps"], 1.25 * eps / (steps or 1))
        attacks.append(Attack(name, kind, None if kind == "clean" else eps,
                              pgd_step if random else eps / steps if iterative else None, steps, int(restarts or 1),
                              start if random else None))
    return attacks


def load_test(name, data_dir, limit, device):
    """The test split, or a fixed random `limit` of it (the first test images of MNIST are easier than the rest)."""
    whole = common.load_split(name, data_dir, "test", device)
    return whole.take(common.subset(len(whole.labels), limit))


def evaluate(model, test, attack, batch_size, seed, precision="float32", images=None):
    """Attack every image of a Split; (which stay correct: bool (N,), largest perturbation measured, in [0, 1] units).

    images: perturbed images made elsewhere (transfer), (N, C, H, W), instead of attacking. Random starts depend on
    seed, attack and batch alone. Predictions are read from the finished images, after a check that they lie in [0, 1].
    """
    flags, largest = torch.empty(len(test.labels), dtype=torch.bool), 0.0
    with common.model_mode(model, "eval"), common.autocast(test.images.device, precision):
        for batch, (x, y, rows) in enumerate(common.eval_batches(test, batch_size, attack.name)):
            common.seed_stream(seed, attack.name, step=batch)
            x_adv = ATTACKS[attack.kind](model, x, y, attack, True) if images is None else images[rows.cpu()].to(x)
            if not (x_adv.amin() >= 0 and x_adv.amax() <= 1):
                raise AssertionError(f"{attack.name} left [0, 1]")
            largest = max(largest, (x_adv - x).abs().amax().item())
            if largest > (attack.eps or 0) + 1e-6:
                raise AssertionError(f"{attack.name} left its ball: {largest} is above {attack.eps}")
            with torch.no_grad():
                flags[rows.cpu()] = (model(x_adv).argmax(1) == y).cpu()
    return flags.numpy(), largest


def transfer_images(path, sha, surrogate, test, attack, batch_size, seed):
    """A surrogate's adversarial images for a Split, (N, C, H, W) float32 on the CPU, judged by no one: all steps are
    taken. They depend on the surrogate alone, so they are made once and kept beside its checkpoint."""
    pixels = hashlib.sha256(test.images.cpu().numpy().tobytes() + test.labels.cpu().numpy().tobytes()).hexdigest()
    key = fingerprint(dict(attack._asdict(), sha=sha, images=pixels, batch_size=batch_size, seed=seed))
    kept = Path(path).with_suffix(f".{attack.name}-{key}.npy")
    if not kept.exists():
        parts = []
        for batch, (x, y, _) in enumerate(common.eval_batches(test, batch_size, f"{attack.name} on {path}")):
            common.seed_stream(seed, attack.name, step=batch)
            parts.append(ATTACKS[attack.kind](surrogate, x, y, attack, False).cpu())
        common.write_beside(kept, lambda file: np.save(file, torch.cat(parts).numpy()))
    return torch.from_numpy(np.load(kept))


def dead_gradients(model, test, batch_size):
    """The share of images whose input gradient of the cross-entropy is zero or not finite: attacks are blind there."""
    dead = 0
    with common.model_mode(model, "eval"):
        for x, y, _ in common.eval_batches(test, batch_size):
            size = common.input_gradient(model, x, y)[0].abs().sum((1, 2, 3))
            dead += ((size == 0) | ~size.isfinite()).sum().item()
    return dead / len(test.labels)


# ---------------------------------------------------------------------------------------------------------- record

def weights_sha256(state_dict):
    """sha256 over names and values: the identity of a network in everything that is measured of it."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        digest.update(name.encode() + state_dict[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(settings):
    """16 hex digits that stand for a dictionary of plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path, value):
    text = json.dumps(value, indent=1) + "\n"
    common.write_beside(path, lambda file: file.write(text.encode()))


class Record:
    """run.eval.json and run.eval.npz: outcomes and per-sample flags of a checkpoint's present networks alone."""

    def __init__(self, path, shas):
        self.json_path, self.npz_path = Path(path).with_suffix(".eval.json"), Path(path).with_suffix(".eval.npz")
        self.shas = list(shas)
        self.read()

    def read(self):
        """What is on disk of these networks; another evaluation of the same checkpoint may have added to it."""
        self.outcomes, self.flags = [], {}
        try:
            if self.json_path.exists():
                self.outcomes = [o for o in json.loads(self.json_path.read_text()) if o["weights_sha256"] in self.shas]
            if self.npz_path.exists():
                keys = {o["key"] for o in self.outcomes}
                with np.load(self.npz_path) as arrays:
                    self.flags = {key: arrays[key] for key in arrays.files if key in keys}
        except Exception as error:
            raise common.UsageError(f"{self.json_path} or its .npz is damaged ({type(error).__name__}): remove both")

    def add(self, settings, measured, flags):
        """Replace the outcome of the same settings and save; returns the outcome."""
        self.read()
        key = fingerprint(settings)
        outcome = dict(settings, **measured, key=key)
        self.outcomes = [o for o in self.outcomes if o["key"] != key] + [outcome]
        self.flags[key] = flags
        common.write_beside(self.npz_path, lambda file: np.savez_compressed(file, **self.flags))
        write_json(self.json_path, self.outcomes)
        return outcome


def results(checkpoint, outcomes, device):
    """The content of results/NAME.json: the outcomes, and how the network came to be."""
    history = checkpoint["history"]
    return dict(script=checkpoint["script"], model=checkpoint["model"], dataset=checkpoint["dataset"],
                args=checkpoint["args"], best_epoch=checkpoint["best"]["epoch"], training=checkpoint["provenance"],
                training_minutes=round(sum(row["seconds"] for row in history) / 60, 1),
                evaluation=common.provenance(device), outcomes=outcomes, history=history)


def export(path, checkpoint, weights):
    """A float16 checkpoint of one set of weights, under `best`; evaluate.py reads it like any other."""
    half = {k: v.half() if v.is_floating_point() else v for k, v in checkpoint[weights]["state_dict"].items()}
    best = dict(checkpoint[weights], metric=checkpoint[weights].get("metric"), state_dict=half)
    slim = dict(checkpoint, best=best, last=None, method_state=None)
    common.write_beside(path, lambda file: torch.save(slim, file))


# ---------------------------------------------------------------------------------------------------------- report

COLUMNS = {"attack": 20, "accuracy": 9, "n": 6, "eps": 8, "step": 8, "steps": 6, "restarts": 9, "start": 6, "seed": 5,
           "largest": 8, "seconds": 8}


def print_outcome(outcome, header):
    """One aligned line, accuracy in %; the first comes with the names of the columns."""
    if header:
        print(" ".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
    shown = dict(outcome, accuracy=f"{100 * outcome['accuracy']:.2f}", seconds=f"{outcome['seconds']:.1f}")
    cells = {name: f"{shown[name]:.4f}" if isinstance(shown[name], float) else shown[name] for name in COLUMNS}
    cells = {name: "-" if cell is None else cell for name, cell in cells.items()}
    print(" ".join(f"{cells[name]:>{width}}" for name, width in COLUMNS.items()), flush=True)


def print_protocol(protocol, dataset, outcomes):
    """The paper's rows and ours, in the paper's columns; a column that was not run stays a dash."""
    try:
        table = json.loads((Path(__file__).parent / "results" / "papers.json").read_text())[protocol][dataset]
    except (OSError, KeyError):
        return print(f"the rows of the paper are not at hand (results/papers.json has none for {protocol}, {dataset})")
    ours = {o["attack"]: 100 * o["accuracy"] for o in outcomes}
    rows = dict(table["rows"], **{"this network": [ours.get(column) for column in table["columns"]]})
    eps = max(o["eps"] or 0 for o in outcomes)
    print(f"\n{table['table']} of the paper ({protocol}, {dataset}, eps {table['eps']}), accuracy in %. This network: "
          f"eps {eps:.4g}, {outcomes[0]['n']} images; attacks may succeed at any step, the paper's at the last.")
    print(f"{'':<14}" + "".join(f"{column:>{len(column) + 2}}" for column in table["columns"]))
    for name, row in rows.items():
        cells = ("-" if value is None else f"{value:.2f}" for value in row)
        print(f"{name:<14}" + "".join(f"{cell:>{len(column) + 2}}" for cell, column in zip(cells, table["columns"])))


def main():
    args = parse()
    device, precision = common.set_up(args.device, args.precision)
    model, checkpoint = common.load_model(args.ckpt, args.weights, device)
    if args.export:
        export(args.export, checkpoint, args.weights)
        return print(f"{args.export}: the {args.weights} weights of {args.ckpt} in float16")
    dataset = checkpoint["dataset"]
    eps = args.eps or (common.DATASETS[dataset]["eps"] if args.protocol else checkpoint["args"]["eps"])
    if args.protocol and dataset not in PROTOCOLS[args.protocol]:
        raise common.UsageError(f"--protocol {args.protocol} has no columns for {dataset}")
    plan = PROTOCOLS[args.protocol][dataset] if args.protocol else QUICK_LOOK
    plan = plan | {name: getattr(args, name) for name in QUICK_LOOK if getattr(args, name) is not None}
    budget = dataset, eps, args.step_size, plan["start"]
    todo = [(attack, None) for attack in parse_attacks(plan["attacks"], *budget)]
    transfer = parse_attacks(plan["transfer"], *budget)
    todo += [(attack, path) for path in args.surrogate for attack in transfer]
    surrogates = {path: common.load_model(path, device=device, dataset=dataset) for path in args.surrogate}
    names = [source["model"] for _, source in surrogates.values()]
    test = load_test(dataset, args.data_dir, plan["limit"] or None, device)

    shas = {w: weights_sha256(checkpoint[w]["state_dict"]) for w in ("best", "last") if checkpoint[w]}
    record, outcomes = Record(args.ckpt, shas.values()), []
    print(f"{args.ckpt}: {checkpoint['script']}, {checkpoint['model']} on {dataset}, {args.weights} weights of epoch "
          f"{checkpoint[args.weights]['epoch']}; {len(test.labels)} test images, {precision}")
    for attack, path in todo:
        settings = dict(attack=attack.name, **attack._asdict(), n=len(test.labels), seed=args.seed, precision=precision,
                        weights=args.weights, weights_sha256=shas[args.weights])
        del settings["name"]
        started, images = time.perf_counter(), None
        if path:
            surrogate, source = surrogates[path]
            sha = weights_sha256(source["best"]["state_dict"])
            name = source["model"] if names.count(source["model"]) == 1 else Path(path).stem
            settings |= dict(attack=f"{attack.name}@{name}", surrogate_sha256=sha)
            images = transfer_images(path, sha, surrogate, test, attack, args.batch_size, args.seed)
        flags, largest = evaluate(model, test, attack, args.batch_size, args.seed, precision, images)
        measured = dict(accuracy=float(flags.mean()), largest=largest, seconds=round(time.perf_counter() - started, 2))
        outcomes.append(record.add(settings, measured, flags))
        print_outcome(outcomes[-1], header=len(outcomes) == 1)
    dead = dead_gradients(model, test, args.batch_size)
    print(f"images with a zero or non-finite gradient: {100 * dead:.2f} %")

    if args.results:
        kept = [outcome for outcome in record.outcomes if outcome["weights"] == args.weights]
        write_json(args.results, results(checkpoint, kept, device))
    if args.protocol:
        print_protocol(args.protocol, dataset, outcomes)
    if wandb := common.wandb_run(vars(args), "evaluate", Path(args.ckpt)):
        wandb.summary.update({f"eval/{o['attack']}": o["accuracy"] for o in outcomes} | {"eval/dead_gradients": dead})
        wandb.finish()


if __name__ == "__main__":
    common.cli(main)
