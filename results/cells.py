"""Cells and Markdown tables of what runs.py reads, for report.py's pages."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import evaluate
from runs import common_n, number, older, seed, shown_method

SEEDS = ("Two seeds: both values; more: mean±deviation; in brackets: the 95 % interval from n "
         "images.")


# ------------------------------------------------------------------------------------------ cells

def written(value, n=None, spread=True):
    """A Number as a cell. n: the column's number of images.

    One seed: value (interval). Two: both values. More: mean +- deviation (interval). spread False
    leaves the interval out.
    """
    if value is None:
        return "not run"
    digits = 2 if (value.n or 0) > 1000 else 1
    text = f"{value.mean:.{digits}f}"
    if len(value.values) == 2:
        text = " / ".join(f"{one:.{digits}f}" for one in value.values)
    elif value.deviation is not None:
        text += f"±{value.deviation:.{digits}f}"
    if value.n and spread and len(value.values) != 2:
        text += f" ({value.low:.1f}-{value.high:.1f})"
    if value.n and value.n != n:
        text += f", n={value.n:,}"
    return text


def title(column):
    """A column's heading: of an attack under several names always the same one."""
    column = evaluate.canonical(column)
    name, mark, rest = re.fullmatch(r"([^:@]*)(.?)(.*)", column).groups()
    known = {"clean": "clean", "aa": "AutoAttack", "minutes": "minutes", "ms": "ms a batch",
             "corruptions": "corruptions", "rays-40000": "RayS-40000"}
    words = known.get(name) or (name if " " in name else re.sub(r"X(?=\d)", "x", name.upper()))
    return f"{words}, eps {rest}" if mark == ":" else f"{words}{mark}{rest}"


# ----------------------------------------------------------------------------------------- tables

def named_once(rows):
    """The rows, their first cell empty where it is that of the row above."""
    above = [None, *(row[0] for row in rows)]
    return [["" if row[0] == last else row[0], *row[1:]] for row, last in zip(rows, above)]


def table(heads, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def links(group, prefix=""):
    """The group's JSON files as links, named by the seed."""
    texts = []
    for network in group:
        for name in network.names:
            which = f"{seed(network)}" if name == network.names[0] else "more"
            texts.append(f"[{which}]({prefix}{name}.json)")
    return ",".join(texts)


def trained_on(group):
    """The network, and the part of the data that it was trained on where it is not all."""
    args = group[0].facts["args"]
    words = [group[0].facts["model"]]
    if args.get("classes"):
        words.append(f"classes {common.shown(args['classes'])}")
    if args.get("limit"):
        words.append(f"{args['limit']:,} images")
    return ", ".join(words)


def name_with_mark(group):
    """The method, with the mark of an older run."""
    return shown_method(group[0]) + ("\\*" if older(group[0]) else "")


def numbers_table(groups, columns, first, last, spread=lambda column: True):
    """A table of groups: first(group) cells, a cell per column, last(group) cells.

    spread(column): whether its cells have an interval.
    """
    values = [[number(group, column) for column in columns] for group in groups]
    ns = [common_n(column) for column in zip(*values)]
    heads = [title(column) + (f", n={n:,}" if n else "") for column, n in zip(columns, ns)]
    rows = []
    for group, row in zip(groups, values):
        cells = [written(value, n, spread(column)) for value, n, column in zip(row, ns, columns)]
        rows.append([*first(group), *cells, *last(group)])
    return heads, rows


def verdict_of(facts):
    """What --sanity found, in a word or two."""
    if "verdict" not in facts:
        return "not run"
    return facts["verdict"].removeprefix("verdict: ").removeprefix("sound, ").partition(":")[0]
