"""The figures of report.py. Each is first plain data, panels of labelled lines, then a picture.

A PNG holds the fingerprint of its data, so that `report.py --check` knows whether it is stale
without comparing pictures, which differ between versions of matplotlib.
"""

import hashlib
import json

import numpy as np

import common
from runs import (best_known, label, main_groups, measured, method, named, number, older,
                  shown_method)

NAMES = ("methods", "overfitting", "masking", "iaat-tradeoff", "dra-transfer")
SIZE = 11  # of the text, in points, of a picture 8 inches wide: about 15 pixels in a README
GAP = 0.055  # between labels beside a panel, as a share of its height, of one panel in a column
SINGLE_STEP = ("fgsm-at", "r1", "r2", "r3", "adv", "atlas", "eat", "trades")
COLOURS = {"sat_rx": 0, "atlas": 1, "iaat": 2, "dra_finetune": 3, "teacher_saliency": 4}


def eps_of(dataset):
    return f"{dataset}, L-infinity eps {common.shown(common.DATASETS[dataset]['eps'])}"


def on(groups, dataset):
    return [group for group in groups if group[0].facts["dataset"] == dataset]


def first_with(group, key):
    """The group's first seed whose history has this key, or None: older runs lack some."""
    return next((network for network in group
                 if any(key in row for row in network.facts["history"])), None)


def history(network, key):
    """(epochs, values) of a key of the history."""
    rows = [row for row in network.facts["history"] if key in row]
    return [row["epoch"] for row in rows], [row[key] for row in rows]


def methods(groups):
    """Clean accuracy against AutoAttack: a large point for a method, small ones for its seeds.

    Of two seeds both are large points, joined by a line: their mean would be neither.
    """
    dataset, chosen = main_groups(groups)
    lines = []
    for group in chosen:
        clean = number(group, "clean")
        aa = number(group, "aa")
        if not clean:
            continue
        script = group[0].facts["script"]
        mark = "*" if older(group[0]) else ""
        line = dict(label=f"{shown_method(group[0])}{mark} ({script})", x=[clean.mean], y=[aa.mean],
                    colour=COLOURS.get(script, 5), style="o", seeds=[])
        seeds = [(measured(network, "clean"), measured(network, "aa")) for network in group]
        seeds = [[100 * x["accuracy"], 100 * y["accuracy"]] for x, y in seeds if x and y]
        if len(seeds) == 2:
            xs, ys = zip(*sorted(seeds, key=lambda point: point[1]))
            line.update(x=xs, y=ys, style="o:")
        else:
            line.update(seeds=seeds, interval=[aa.low, aa.high])
        lines.append(line)
    if not lines:
        return None
    panel = dict(title="", xlabel="clean accuracy, %", ylabel="accuracy under AutoAttack, %",
                 lines=lines, leaders=True)
    note = ("bars: 95 % from the number of images; joined: two seeds\n"
            "*: an older run; settings differ, see the table")
    return dict(paper=None, alt="All methods, clean accuracy against AutoAttack",
                title=f"{eps_of(dataset)}\n{note}", panels=[panel], columns=1)


def overfitting(groups):
    """Validation accuracy under FGSM and PGD over epochs, single-step methods, best epoch marked.

    One panel per method of the main table's data set, those with the widest gap, six at most.
    """
    dataset, _ = main_groups(groups)
    panels = []
    known = [group for group in on(groups, dataset) if method(group[0]) in SINGLE_STEP
             and (first_with(group, "val/fgsm") or first_with(group, "val/weak"))]
    for (script, name), group in best_known(known).items():
        weak = "val/fgsm" if first_with(group, "val/fgsm") else "val/weak"
        network = first_with(group, weak)
        keys = sorted({key for row in network.facts["history"] for key in row})
        strong = next((key for key in keys if key.startswith("val/pgd")), "val/robust")
        epochs, pgd = history(network, strong)
        same, fgsm = history(network, weak)
        if not epochs or epochs != same:
            continue
        lines = [dict(label="FGSM" if weak == "val/fgsm" else "one step", x=epochs,
                      y=[100 * value for value in fgsm], colour=1, style="--"),
                 dict(label="PGD", x=epochs, y=[100 * value for value in pgd], colour=0,
                      style="-")]
        panel = dict(title=f"{name} ({script}.py)", xlabel="epoch", lines=lines,
                     ylabel="held-out accuracy, %", best=network.facts["best_epoch"],
                     ylim=[-2, 102])
        panels.append((max(a - b for a, b in zip(fgsm, pgd)), panel))
    widest = [panel for _, panel in sorted(panels, key=lambda pair: -pair[0])][:6]
    if not widest:
        return None
    return dict(paper="sat_rx", alt="Catastrophic overfitting of single-step training",
                title=f"Catastrophic overfitting: {eps_of(dataset)}\ndotted: the best epoch, "
                "whose weights are kept", panels=widest, columns=min(2, len(widest)))


def masking(groups):
    """The paper's figs. 1 and 2: distances between logits, and the loss gap, over epochs."""
    dataset, _ = main_groups(groups)
    known = [group for group in on(groups, dataset) if first_with(group, "masking/loss_gap")]
    chosen = {name: first_with(group, "masking/loss_gap")
              for (_, name), group in best_known(known).items()}
    if not chosen:
        return None
    panels = []
    for key, text in (("l2_ifgsm", "distance between the logits of FGSM and IFGSM samples"),
                      ("l2_rfgsm", "distance between the logits of FGSM and R-FGSM samples"),
                      ("loss_gap", "loss under PGD minus loss under FGSM")):
        lines = []
        for colour, name in enumerate(sorted(chosen)):
            epochs, values = history(chosen[name], f"masking/{key}")
            lines.append(dict(label=name, x=epochs, y=values, colour=colour, style="-"))
        scale = "symlog" if key == "loss_gap" else "log"
        panels.append(dict(title=text, xlabel="epoch", ylabel="", lines=lines, scale=scale))
    return dict(paper="sat_rx", alt="Signals of gradient masking, figs. 1 and 2 of the paper",
                title=f"Signals of masked gradients: {eps_of(dataset)}\nheld-out images; high "
                "where gradients are masked, and for nt, which has no defence", panels=panels,
                columns=1)


def tradeoff(groups):
    """Fig. 3 of IAAT: PGD-AT at several eps is a curve, IAAT should lie above it."""
    chosen = named(groups, ["iaat-cifar-*"])
    column = next((name for name in ("aa", "pgd-100", "pgd-20")
                   if sum(bool(number(group, name)) for group in chosen) > 1), None)
    if not column:
        return None
    points = []
    for group in chosen:
        x = number(group, column)
        y = number(group, "clean")
        if x and y:
            eps = common.shown(group[0].facts["args"]["eps"])
            points.append((method(group[0]), label(group), eps, x, y))
    strength = "AutoAttack" if column == "aa" else column.upper()
    lines = [dict(label=f"PGD-AT, eps {eps}" if name == "pgd-at" else text, x=[x.mean],
                  y=[y.mean], colour=0 if name == "pgd-at" else 2, style="o",
                  across=[x.low, x.high], interval=[y.low, y.high])
             for name, text, eps, x, y in points]
    curve = sorted((x.mean, y.mean) for name, _, _, x, y in points if name == "pgd-at")
    panel = dict(title="", xlabel=f"accuracy under {strength}, %", ylabel="clean accuracy, %",
                 lines=lines, leaders=True, curve=curve)
    return dict(paper="iaat", alt="Clean accuracy against robustness, PGD-AT's eps and IAAT",
                title=f"Trade-off: {eps_of('cifar10')} at test time\nbars: 95 % from the number "
                "of images", panels=[panel], columns=1)


def transfer(groups):
    """DRA: accuracy under white-box PGD against images made on another network.

    Below the diagonal the network is fooled more by another's images: its gradient is masked.
    """
    own = [group for group in groups if group[0].facts["script"] == "dra_finetune"]
    found = {}
    for group in own:
        for column in ("pgd-20", "pgd-100", "mi-fgsm-40", "fgsm"):
            x = number(group, column)
            y = number(group, f"{column}@surrogate")
            if x and y:
                line = dict(label=f"{label(group)}, {column.upper()}", x=[x.mean], y=[y.mean],
                            colour=3 if method(group[0]) == "finetune" else 7, style="o",
                            across=[x.low, x.high], interval=[y.low, y.high])
                found.setdefault(group[0].facts["dataset"], []).append(line)
                break
    if not found:
        return None
    dataset = max(sorted(found), key=lambda name: len(found[name]))
    lines = found[dataset]
    panel = dict(title="", xlabel="white-box accuracy, %", ylabel="accuracy under transfer, %",
                 lines=lines, leaders=True, curve=[[0, 0], [100, 100]])
    return dict(paper="dra_finetune", alt="DRA: white-box against transfer",
                title=f"White-box against transfer: {eps_of(dataset)}\nbelow the grey line: the "
                "gradient is masked", panels=[panel], columns=1)


def collect(groups):
    """{name: figure} of those that have data."""
    made = zip(NAMES, (methods, overfitting, masking, tradeoff, transfer))
    figures = {name: make(groups) for name, make in made}
    return {name: figure for name, figure in figures.items() if figure}


# ---------------------------------------------------------------------------------------- pictures

def fingerprint(figure):
    """A mark of the figure's data; last digits, which differ between CPUs, do not count."""
    rounded = json.loads(json.dumps(figure), parse_float=lambda text: round(float(text), 6))
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def stale(folder, figures):
    """Paths of pictures that are missing, show other data, or have no data any more."""
    from PIL import Image
    paths = []
    for name in NAMES:
        path = folder / f"{name}.png"
        kept = Image.open(path).text.get("Description") if path.exists() else None
        now = fingerprint(figures[name]) if name in figures else None
        if kept != now:
            paths.append(path)
    return paths


def apart(places, gap):
    """Places in [0, 1], moved as little as need be so that neighbours are `gap` apart."""
    order = np.argsort(places, kind="stable")
    moved = np.array(places, float)
    for _ in range(200):
        for low, high in zip(order, order[1:]):
            short = gap - (moved[high] - moved[low])
            if short > 1e-6:
                moved[low] -= short / 2
                moved[high] += short / 2
        moved += max(0, -moved.min()) - max(0, moved.max() - 1)
    return moved


def draw_labels(ax, panel, gap):
    """Each line's label at the right of the panel, in its colour; a leader to a lone point."""
    lines = panel["lines"]
    ax.get_xlim()  # settles both axes' limits
    ax.get_ylim()
    ends = [ax.transData.transform((line["x"][-1], line["y"][-1])) for line in lines]
    ends = [ax.transAxes.inverted().transform(end) for end in ends]
    for line, end, place in zip(lines, ends, apart([end[1] for end in ends], gap)):
        colour = f"C{line['colour']}"
        ax.annotate(line["label"], xy=end, xytext=(1.04, place), xycoords="axes fraction",
                    textcoords="axes fraction", color=colour, va="center", fontsize=SIZE,
                    annotation_clip=False,
                    arrowprops=dict(arrowstyle="-", relpos=(0, 0.5), color=colour, lw=1, ls=":",
                                    alpha=0.7))


def draw_panel(ax, panel, gap):
    """Lines, points with bars, small points of the seeds, the best epoch."""
    if "curve" in panel and panel["curve"]:
        ax.plot(*zip(*panel["curve"]), color="0.75", zorder=0, scalex=False, scaley=False)
    for line in panel["lines"]:
        colour = f"C{line['colour']}"
        ax.plot(line["x"], line["y"], line["style"], color=colour, lw=1.8, markersize=8)
        if "interval" in line:
            ax.vlines(line["x"], *line["interval"], color=colour, lw=1.2)
        if "across" in line:
            ax.hlines(line["y"], *line["across"], color=colour, lw=1.2)
        for x, y in line.get("seeds", [])[:None if len(line.get("seeds", [])) > 1 else 0]:
            ax.plot(x, y, ".", color=colour, alpha=0.6, markersize=7)
    if "best" in panel:
        ax.axvline(panel["best"], color="0.3", ls=":", lw=1.5)
    if panel["xlabel"] == "epoch":
        ax.xaxis.get_major_locator().set_params(integer=True)
    if "ylim" in panel:
        ax.set_ylim(panel["ylim"])
    if "scale" in panel:
        ax.set_yscale(panel["scale"])
    ax.set_title(panel["title"], fontsize=SIZE, loc="left")
    ax.set_xlabel(panel["xlabel"], fontsize=SIZE)
    ax.set_ylabel(panel["ylabel"], fontsize=SIZE)
    ax.tick_params(labelsize=SIZE - 1)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    draw_labels(ax, panel, gap)


def save(path, figure):
    """Write a figure's picture with its fingerprint; without a figure, remove the picture."""
    if figure is None:
        path.unlink()
        return
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    count = len(figure["panels"])
    columns = figure["columns"]
    rows = -(-count // columns)
    height = 5.5 if count == 1 else 2.6 * rows + 0.8
    picture, axes = plt.subplots(rows, columns, figsize=(8, height), squeeze=False,
                                 layout="constrained")
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    picture.suptitle(figure["title"], fontsize=SIZE + 1)
    for ax, panel in zip(axes.flat, figure["panels"]):
        draw_panel(ax, panel, GAP * 4.4 * rows / height if count > 1 else GAP)
    path.parent.mkdir(exist_ok=True)
    picture.savefig(path, dpi=150, metadata=dict(Description=fingerprint(figure), Software=None))
    plt.close(picture)
