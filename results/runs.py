"""What results/*.json say: networks, their seeds, numbers with intervals, and comparisons of them.

Networks are seeds of one method where script, network, data and all flags agree but the seed and
paths. An accuracy of several seeds is their mean; its interval is the 95 % one of Wilson for the
number of test images, which all seeds share. report.py makes tables and figures of this.
"""

import fnmatch
import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import evaluate

PATHS = ("ckpt", "init", "teacher", "source", "data_dir")  # flags that differ between seeds ...
MACHINE = ("seed", "resume", "overwrite", "device", "workers", "wandb")  # ... as do these
STAGE = r"\.(teacher|vanilla|align|k\d+)$"  # what a script saves beside its --ckpt
SEED_IN_NAME = r"-s(eed)?\d+(?=\.|$)"


# ------------------------------------------------------------------------------------ the networks

class Network(NamedTuple):
    """One set of weights. names: its JSON files. facts: the first of them. outcomes: of all."""
    names: list
    facts: dict
    outcomes: list


def load(folder):
    """The networks of a folder's *.json, sorted by name; files of the same weights are one.

    Without verdict-*.json: those tell of the verdict, not of a method.
    """
    files = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    files = {name: facts for name, facts in files.items()
             if "outcomes" in facts and not name.startswith("verdict-")}
    found = {}
    for name in sorted(files, key=lambda name: (not name.startswith(files[name]["script"]), name)):
        facts = files[name]
        weights = (facts["script"], facts["outcomes"][0]["weights_sha256"])
        network = found.setdefault(weights, Network([], facts, []))
        network.names.append(name)
        for outcome in facts["outcomes"]:  # older ones know aliases as kinds
            kind = evaluate.ALIASES.get(outcome["kind"], outcome["kind"])
            network.outcomes.append(dict(outcome, kind=kind))
    return sorted(found.values(), key=lambda network: network.names)


def stage(network):
    """teacher, align, k50 ... where the network is not the script's last one; else ""."""
    words = network.facts["evaluation"]["command"].split()
    place = words[words.index("--ckpt") + 1] if "--ckpt" in words else ""
    found = re.search(STAGE, re.sub(r"\.pt$", "", place))
    return found[1] if found else ""


def method(network):
    """The method's name as its flag has it; older runs call the flag otherwise."""
    args = network.facts["args"]
    name = args.get("method") or args.get("strategy") or args.get("loss")
    if name is None or stage(network):
        name = stage(network) or "curriculum"
    return name


def seed(network):
    return network.facts["args"].get("seed", 0)


def same_method(a, b):
    """Whether two networks may be seeds of one method. Flags that only one knows do not count."""
    if any(a.facts[what] != b.facts[what] for what in ("script", "model", "dataset")):
        return False
    one = a.facts["args"]
    other = b.facts["args"]
    if stage(a) != stage(b) or any(bool(one.get(path)) != bool(other.get(path)) for path in PATHS):
        return False
    flags = set(one) & set(other) - {*PATHS, *MACHINE}
    return all(one[flag] == other[flag] for flag in flags)


def grouped(networks):
    """Lists of networks that differ in the seed alone; a seed's second network is a group apart."""
    groups = []
    for network in networks:
        fit = [group for group in groups if same_method(group[0], network)
               and seed(network) not in map(seed, group)]
        if fit:
            fit[0].append(network)
        else:
            groups.append([network])
    return [sorted(group, key=seed) for group in groups]


def label(group):
    """A group's name: its first file's without the seed."""
    return re.sub(SEED_IN_NAME, "", group[0].names[0].removesuffix("-common"))


# ------------------------------------------------------------------------------------- the numbers

class Number(NamedTuple):
    """A mean over seeds. Accuracies in %, with n images; n None: minutes, ms, validation."""
    mean: float
    deviation: float | None
    low: float
    high: float
    n: int | None
    seeds: int


@functools.lru_cache(maxsize=None)
def asked(column, dataset, step=None, start="ball"):
    """(Attack, surrogate's label or "") of a column's name, as evaluate.py would run it."""
    head, at, tail = column.rpartition("@")
    surrogate = tail if at and not re.fullmatch(r"[\d./e:-]+", tail) else ""
    facts = dict(common.DATASETS.get(dataset, common.CIFAR10), name=dataset, chosen=None)
    attacks = evaluate.parse_attacks(head if surrogate else column, facts, facts["eps"],
                                     step=step, start=start)
    return attacks[0], surrogate


def close(a, b):
    return a == b or (None not in (a, b) and abs(a - b) < 1e-6)


def is_asked(outcome, attack, surrogate):
    """Whether an outcome is that of this attack: by its budget, whatever its name."""
    made_on = outcome["attack"].rpartition("@")[2] if "surrogate_sha256" in outcome else ""
    same = [outcome[field] == getattr(attack, field) for field in ("kind", "steps", "restarts")]
    same += [close(outcome[field], getattr(attack, field)) for field in ("eps", "step")]
    plain = outcome.get("bn_mode", "eval") == "eval" and not outcome.get("linf")
    units = evaluate.NORMALISED not in outcome["attack"]
    return (all(same) and plain and units
            and (surrogate == made_on or surrogate == "surrogate" and made_on != ""))


def measured(network, column, **protocol):
    """The outcome of a column, of most images; of several surrogates the strongest; or None."""
    attack, surrogate = asked(column, network.facts["dataset"], **protocol)
    found = [outcome for outcome in network.outcomes if is_asked(outcome, attack, surrogate)]
    order = {}
    for outcome in found:
        order[outcome["n"], outcome.get("start") == attack.start, -outcome["accuracy"],
              outcome.get("key", "")] = outcome
    return order[max(order)] if order else None


def from_training(network, column):
    """minutes, ms (of a batch, last epoch), "best ..." and "last ..." of the history; or None."""
    history = network.facts["history"]
    if column == "minutes":
        return network.facts.get("training_minutes")
    if column == "ms":
        return history[-1].get("cost/ms_per_batch")
    which, _, key = column.partition(" ")
    values = [100 * row[key] for row in history if key in row]
    if not values:
        return None
    return max(values) if which == "best" else values[-1]


def number(group, column, **protocol):
    """The Number of a group of seeds, or None where none has been measured."""
    if column in ("minutes", "ms") or column.startswith(("best ", "last ")):
        values = [from_training(network, column) for network in group]
        values = [value for value in values if value is not None]
        n = None
    else:
        outcomes = [measured(network, column, **protocol) for network in group]
        outcomes = [outcome for outcome in outcomes if outcome]
        values = [100 * outcome["accuracy"] for outcome in outcomes]
        n = min((outcome["n"] for outcome in outcomes), default=None)
    if not values:
        return None
    mean = float(np.mean(values))
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    low = high = mean
    if n:
        low, high = (100 * share for share in evaluate.wilson(mean / 100, n))
    return Number(mean, deviation, low, high, n, len(values))


# ----------------------------------------------------------------------------------------- claims

class Comparison(NamedTuple):
    """Two sides of a claim. low, high: of method - control, in points; the verdict in words."""
    say: str
    column: str
    method: Number | None
    control: Number | None
    low: float | None
    high: float | None
    verdict: str


def named(groups, patterns):
    """The groups that have a JSON whose name fits a pattern, in the patterns' order."""
    found = []
    for pattern in patterns:
        for group in groups:
            names = [name for network in group for name in network.names]
            if fnmatch.filter(names, pattern) and group not in found:
                found.append(group)
    return found


def side(groups, patterns, column):
    """The Number of the first group of these names that has this column, or None."""
    numbers = (number(group, column) for group in named(groups, patterns))
    return next((value for value in numbers if value), None)


def on_curve(groups, test, column, method):
    """The control's Number at the method's place on the curve of several groups, or None.

    test["curve"] names the column that is the curve's abscissa; its own interval is taken along.
    """
    place = side(groups, test["method"], test["curve"])
    points = [(number(group, test["curve"]), number(group, column))
              for group in named(groups, test["control"])]
    points = sorted((x.mean, y.mean) for x, y in points if x and y)
    if not method or not place or not points:
        return None
    if not points[0][0] <= place.mean <= points[-1][0]:
        return None
    xs, ys = zip(*points)
    mean, one, other = (float(np.interp(x, xs, ys)) for x in (place.mean, place.low, place.high))
    return Number(mean, None, min(one, other, mean), max(one, other, mean), None, 1)


def seeds_part(method, control, times):
    """Half the 95 % interval of the difference that the spread over seeds gives; 0: one seed each.

    Welch's where both sides have several seeds. A side with one is given the other's deviation.
    """
    sides = ((method, 1), (control, times))
    several = [side for side, _ in sides if side.seeds > 1]
    if not several:
        return 0.0
    parts = []
    for side, factor in sides:
        spread = side.deviation if side.seeds > 1 else several[0].deviation
        parts.append((factor * spread) ** 2 / side.seeds)
    variance = sum(parts)
    if not variance:
        return 0.0
    freedom = several[0].seeds - 1
    if len(several) == 2:
        freedom = variance ** 2 / sum(part ** 2 / (side.seeds - 1)
                                      for part, (side, _) in zip(parts, sides))
    return float(student.ppf(0.975, freedom)) * math.sqrt(variance)


def interval(method, control, times):
    """(low, high) of method - times * control, in points: 95 %, from the images and the seeds."""
    difference = method.mean - times * control.mean
    seeds = seeds_part(method, control, times)
    below = math.hypot(method.mean - method.low, times * (control.high - control.mean), seeds)
    above = math.hypot(method.high - method.mean, times * (control.mean - control.low), seeds)
    low = difference - below
    high = difference + above
    if method.n:  # accuracies
        low = max(low, -100.0)
        high = min(high, 100.0)
    return low, high


def sides(groups, test, column):
    """(method, control): the Numbers of a test in a column, None what was not run."""
    method = side(groups, test["method"], column)
    if "curve" in test:
        return method, on_curve(groups, test, column, method)
    return method, side(groups, test["control"], test.get("control_column", column))


def compare(groups, test):
    """The Comparison of a claim's test, an entry of results/claims.json.

    method, control: names of JSON files, `*` for seeds; the first group that has the column counts.
    column: what is compared, for the control control_column where it is given. Of a list the first
    that both sides have is taken. The test holds where method - times * control, times 1 unless
    given, is above `above` and below `below` (points) with its whole interval. curve: the column
    by which the control is a curve, read at the method's place.
    """
    columns = test["column"] if isinstance(test["column"], list) else [test["column"]]
    pairs = {column: sides(groups, test, column) for column in columns}
    column = next((column for column in columns if None not in pairs[column]), columns[0])
    method, control = pairs[column]
    if method is None or control is None:
        return Comparison(test["say"], column, method, control, None, None, "not run")
    low, high = interval(method, control, test.get("times", 1))
    least = test.get("above", -math.inf)
    most = test.get("below", math.inf)
    verdict = "not distinguishable"
    if low > least and high < most:
        verdict = "holds"
    elif high < least or low > most:
        verdict = "fails"
    if method.seeds == 1 and control.seeds == 1:
        verdict += ", one seed"
    return Comparison(test["say"], column, method, control, low, high, verdict)


def concluded(comparisons):
    """The verdict of a claim from those of its comparisons, and how many of them were run."""
    run = [comparison.verdict for comparison in comparisons if comparison.verdict != "not run"]
    if not run:
        return "not run"
    kinds = {verdict.partition(",")[0] for verdict in run}
    if len(kinds) == 1:
        verdict = kinds.pop()
    elif {"holds", "fails"} <= kinds:
        verdict = "mixed"
    else:
        verdict = "holds in part" if "holds" in kinds else "fails in part"
    if all(verdict.endswith("one seed") for verdict in run):
        verdict += ", one seed"
    if len(run) < len(comparisons):
        verdict += f" ({len(run)} of {len(comparisons)} comparisons run)"
    return verdict


def best_known(groups):
    """{(script, method): group}: one group of each method, that of most epochs, then most seeds.

    Of equals the one whose training command has the fewest words: nearest to the defaults.
    """
    best = {}
    for group in groups:
        facts = group[0].facts
        words = len((facts["training"].get("command") or "").split())
        rank = (len(facts["history"]), len(group), -words)
        key = (facts["script"], method(group[0]))
        if key not in best or rank > best[key][0]:
            best[key] = (rank, group)
    return {key: best[key][1] for key in sorted(best)}


def main_groups(groups):
    """(data set, {(script, method): group}) of the main table: networks with AutoAttack's number.

    The rows of one budget on CIFAR-10 where there are any, else MNIST's.
    """
    for dataset, pattern in (("cifar10", "cifar10-*"), ("mnist", "*")):
        found = [group for group in named(groups, [pattern])
                 if group[0].facts["dataset"] == dataset and number(group, "aa")]
        if found:
            break
    return dataset, best_known(found)
