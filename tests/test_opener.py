"""One opener for every network: wrappers, prefixes, formats, and the user's own files."""

import argparse
import json
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import common
import sat_rx
from conftest import run_main

DIGITS = common.dataset_facts("digits")
NET = """
from torch import nn

class Inner(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Inner()
    def forward(self, x):
        return self.module((x - 0.3) / 0.3)

def plain():
    return Inner()

def parallel():
    return nn.DataParallel(Inner())

class Extra(Inner):  # keeps what is no tensor beside its weights
    version = 0
    def get_extra_state(self):
        return dict(version=self.version)
    def set_extra_state(self, state):
        self.version = state["version"] + 1
"""


@pytest.fixture
def net(tmp_path):
    """(path of net.py, the weights of one of its networks)."""
    path = tmp_path / "net.py"
    path.write_text(NET)
    torch.manual_seed(1)
    return path, common.imported_net(f"{path}:plain", 10).state_dict()


def opened(path, content, architecture):
    """The weights that the opener finds in a file of `content`, by their order."""
    torch.save(content, path)
    model, _ = common.load_model(path, facts=DIGITS, architecture=architecture)
    assert not model.training
    return list(model.net.state_dict().values())


def under(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.",
                                    "net.", "model.module.", "a.b.c."])
@pytest.mark.parametrize("function", ["plain", "Wrapped", "parallel"])
def test_prefixes_where_the_keys_then_fit(net, tmp_path, prefix, function):
    path, weights = net
    found = opened(tmp_path / "w.pt", under(prefix, weights), f"{path}:{function}")
    assert len(found) == len(weights)
    assert all(torch.equal(a, b) for a, b in zip(found, weights.values()))


@pytest.mark.parametrize("keys", [
    ["state_dict"], ["model_state_dict"], ["model"], ["net"], ["ema"], ["params"], ["anything"],
    ["model", "state_dict"], ["checkpoint", "model", "ema"]])
def test_wrappers(net, tmp_path, keys):
    """The usual ones and others, beside what training scripts save with them."""
    path, weights = net
    content = OrderedDict(under("module.", weights))
    for key in reversed(keys):
        content = {"epoch": 3, "lr": np.float64(0.1), "seed": np.int64(3), key: content,
                   "args": argparse.Namespace(lr=0.1, where=Path("x"), list=[np.float32(1)]),
                   "curve": np.arange(3.0), "optimizer": {"state": {0: {"exp": torch.ones(2)}}}}
    found = opened(tmp_path / "w.pt", content, f"{path}:plain")
    assert all(torch.equal(a, b) for a, b in zip(found, weights.values()))


def test_the_first_that_fits_is_taken_and_said(net, tmp_path, capsys):
    path, weights = net
    ema = {name: value + 1 for name, value in weights.items()}
    content = dict(ema=ema, model=weights, teacher={"fc.weight": torch.ones(3)})
    found = opened(tmp_path / "w.pt", content, f"{path}:plain")
    assert torch.equal(found[0], weights["1.weight"])
    said = capsys.readouterr().out
    assert "those of 'model'" in said and "ema" in said and "teacher" not in said


def test_what_does_not_fit_is_named(net, tmp_path):
    """Missing, additional, or of another shape; a layer of theirs is never dropped in silence."""
    path, weights = net
    fewer = {name: value for name, value in weights.items() if name != "1.bias"}
    other = dict(weights, **{"1.weight": torch.zeros(7, 784)})
    for content, named in ((fewer, "1.bias"), (dict(weights, mean=torch.ones(1)), "mean"),
                           (other, "size mismatch"), ({}, "nor a state_dict"), (3, "state_dict"),
                           ([torch.ones(1)], "state_dict")):
        with pytest.raises(common.UsageError, match=named):
            opened(tmp_path / "w.pt", content, f"{path}:plain")
    with pytest.raises(common.UsageError, match="--model and --dataset"):
        opened(tmp_path / "w.pt", weights, None)


def test_only_what_differs_is_named(net, tmp_path):
    """Prefixes set aside: of Madry's robustness library, a normaliser and an attacker's copy."""
    path, weights = net
    inner = under("module.1.", weights)
    cases = ((dict(inner, **{"module.0.mean": torch.ones(1)}), "lacks module.0.mean"),
             (dict(list(inner.items())[1:]), r"file lacks 1.weight\)"))
    library = {**under("module.model.", weights), "module.normalizer.new_mean": torch.ones(1),
               **under("module.attacker.model.", weights)}
    cases += ((dict(model=library), "under 'model' fit.*also holds module.normalizer.new_mean"),)
    for content, named in cases:
        with pytest.raises(common.UsageError, match=named) as error:
            opened(tmp_path / "w.pt", content, f"{path}:plain")
        assert "1.bias" not in str(error.value).partition("attacker")[0], "it fits"
    other = {"conv.weight": torch.ones(1), "conv.bias": torch.ones(1)}
    with pytest.raises(common.UsageError, match=r"lacks 1.weight, 1.bias.*lacks conv.weight, c"):
        opened(tmp_path / "w.pt", other, f"{path}:plain")
    path.write_text(NET.replace("self.module = Inner()", "self.module = Inner()\n"
                                "        self.register_buffer('mu', torch.ones(1))")
                    .replace("from torch", "import torch\nfrom torch", 1))
    with pytest.raises(common.UsageError, match=r"\(the file lacks mu\)"):  # RobustBench's
        opened(tmp_path / "w.pt", dict(state_dict=under("module.", weights)), f"{path}:Wrapped")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_are_no_floating_numbers_are_refused(net, tmp_path, dtype):
    """Quantised ones without their scale would be copied as they are."""
    path, weights = net
    content = dict(weights, **{"1.weight": (100 * weights["1.weight"]).to(dtype)})
    with pytest.raises(common.UsageError, match=f"1.weight holds {dtype}"):
        opened(tmp_path / "w.pt", content, f"{path}:plain")


def test_a_module_of_several_networks(net, tmp_path, capsys):
    """Lightning's: the model beside its average and its loss. A layer of theirs is not dropped."""
    path, weights = net
    average = {name: value + 1 for name, value in weights.items()}
    both = {**under("average.", average), **under("model.", weights)}
    loss = {**under("net.", weights), "criterion.weight": torch.ones(10)}
    for state in (both, loss):
        content = dict(state_dict=state, hyper_parameters=dict(lr=0.1), loops={})
        found = opened(tmp_path / "w.pt", content, f"{path}:plain")
        assert all(torch.equal(a, b) for a, b in zip(found, weights.values()))
    said = capsys.readouterr().out
    assert "those of 'state_dict.model', the file also holds state_dict.average" in said
    layer = {**under("model.", weights), "normalize.mean": torch.ones(1)}
    with pytest.raises(common.UsageError, match="under 'model' fit.*also holds normalize.mean"):
        opened(tmp_path / "w.pt", layer, f"{path}:plain")
    plain_names = {**under("1.", weights), **under("0.", average)}  # layers, perhaps
    with pytest.raises(common.UsageError, match="do not fit"):
        opened(tmp_path / "w.pt", plain_names, f"{path}:plain")


def test_what_is_no_checkpoint_is_named(tmp_path):
    import tarfile
    import zipfile
    file = tmp_path / "w.pt"
    for content, named in ((b"", "is empty"), (b"<!DOCTYPE html>", "web page"),
                           (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
                           (b"PK\3\4 cut short", "damaged")):
        file.write_bytes(content)
        with pytest.raises(common.UsageError, match=named):
            common.load_file(file)
    torch.save(torch.ones(1), tmp_path / "inner.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "inner.pt")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "inner.pt")
    for name in ("a.zip", "a.tar"):
        with pytest.raises(common.UsageError, match="unpack it"):
            common.load_file(tmp_path / name)


def test_files_that_are_no_weights_are_named(net, tmp_path):
    """Each says what to do. An index of shards is read with its shards."""
    import os
    import pickle
    from safetensors.torch import save_file
    path, weights = net
    names = list(weights)
    parts = {}
    for file, chosen in (("a.safetensors", names[:3]), ("b.safetensors", names[3:])):
        save_file({name: weights[name] for name in chosen}, tmp_path / file)
        parts.update(dict.fromkeys(chosen, file))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map=parts)))
    assert all(torch.equal(common.load_file(index)[name], weights[name]) for name in names)
    (tmp_path / "config.json").write_text('{"hidden": 3}')
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(dict(weights)))
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    os.mkfifo(tmp_path / "pipe")
    for name, named in (("config.json", "is JSON"), ("w.pkl", "save its state_dict by torch.save"),
                        ("w.npz", "numpy's .npz"), ("pipe", "is a pipe")):
        with pytest.raises(common.UsageError, match=named):
            common.load_file(tmp_path / name)
    with pytest.raises(common.UsageError, match="1.weight is on the device meta"):
        opened(tmp_path / "w.pt", dict(weights, **{"1.weight": weights["1.weight"].to("meta")}),
               f"{path}:plain")


def test_of_equal_names_the_shapes_decide(net, tmp_path, capsys):
    """A larger teacher beside its student; tuples and lists are looked into, too."""
    path, weights = net
    teacher = {name: torch.ones(3, 3) for name in weights}
    deep = dict(a=dict(b=dict(c=dict(d=dict(e=weights)))))
    for content in (dict(teacher=teacher, student=weights), (weights, 3), [teacher, weights], deep):
        found = opened(tmp_path / "w.pt", content, f"{path}:plain")
        assert all(torch.equal(a, b) for a, b in zip(found, weights.values()))
    assert "also holds" not in capsys.readouterr().out


def test_weights_under_two_names(tmp_path):
    """safetensors.torch.save_model keeps one name of each tensor, whichever comes first."""
    from safetensors.torch import save_model
    (tmp_path / "net.py").write_text("""
from torch import nn
class Tied(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 8), nn.Linear(8, 8), nn.Linear(8, 8),
                         nn.Linear(8, 10))
        self[3].weight = self[2].weight
""")
    name = f"{tmp_path}/net.py:Tied"
    own = common.imported_net(name, 10)
    save_model(own, str(tmp_path / "kept.safetensors"))
    expected = own.state_dict()
    files = [common.load_file(tmp_path / "kept.safetensors")]
    for lost in ("2.weight", "3.weight"):
        files.append(under("model.", {n: v for n, v in expected.items() if n != lost}))
    for content in files:
        assert len(content) == len(expected) - 1
        found = opened(tmp_path / "w.pt", content, name)
        assert all(torch.equal(a, b) for a, b in zip(found, expected.values()))
    neither = {n: v for n, v in expected.items() if n not in ("2.weight", "3.weight")}
    with pytest.raises(common.UsageError, match="file lacks 2.weight, 3.weight"):
        opened(tmp_path / "w.pt", neither, name)


def test_init_from_nan_is_refused(net, tmp_path):
    path, weights = net
    weights["1.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "w.pt")
    model = common.build_model(f"{path}:plain", DIGITS)
    with pytest.raises(common.UsageError, match="holds NaN in 1.bias: nothing can be trained"):
        common.load_init(model, tmp_path / "w.pt")


def test_counters_do_not_decide(net, tmp_path):
    """BatchNorm's of old files are missing; an averaged network has one more."""
    path, weights = net
    old = {name: value for name, value in weights.items() if "num_batches" not in name}
    average = dict(under("module.", weights), n_averaged=torch.tensor(4))
    for content in (old, average):
        found = opened(tmp_path / "w.pt", content, f"{path}:plain")
        assert torch.equal(found[0], weights["1.weight"])


def test_a_file_that_needs_code_is_refused_and_the_code_named(net, tmp_path):
    for content in (dict(model=nn.Linear(2, 2)), dict(f=print), dict(a=np.array([print], object))):
        with pytest.raises(common.UsageError, match="would run code"):
            opened(tmp_path / "w.pt", content, "lenet+")
    scripted = torch.jit.script(nn.Linear(2, 2))
    scripted.save(str(tmp_path / "s.pt"))
    with pytest.raises(common.UsageError, match="TorchScript"):
        common.load_model(tmp_path / "s.pt", facts=DIGITS, architecture="lenet+")


def test_safetensors(net, tmp_path, monkeypatch):
    """Read by the package, whatever the name of the file; without it, one line."""
    path, weights = net
    file = tmp_path / "w.pth"
    header = b'{"__metadata__":{}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(common.UsageError, match="pip install safetensors"):
        common.load_file(file)
    monkeypatch.undo()
    from safetensors.torch import save_file
    save_file(dict(weights), file)
    model, _ = common.load_model(file, facts=DIGITS, architecture=f"{path}:plain")
    assert torch.equal(model.net.state_dict()["1.weight"], weights["1.weight"])


@pytest.mark.parametrize("function", ["Wrapped", "parallel", "Extra"])
def test_a_run_of_a_wrapped_network_is_always_read(net, tmp_path, function):
    """By evaluate.py, --resume and --init; of weights of somebody else, --init, too."""
    path, weights = net
    words = ["--method", "nt", "--dataset", "digits", "--limit", 60, "--val", 0, "--batch-size",
             30, "--wandb", "disabled", "--model", f"{path}:{function}"]
    run_main(sat_rx.main, "sat_rx.py", *words, "--epochs", 1, "--ckpt", tmp_path / "a.pt")
    run_main(sat_rx.main, "sat_rx.py", *words, "--epochs", 1, "--ckpt", tmp_path / "a.pt",
             "--resume")
    torch.save(dict(ema=under("net.", weights)), tmp_path / "theirs.pth")
    for name, init in (("b", "a.pt"), ("c", "theirs.pth")):
        run_main(sat_rx.main, "sat_rx.py", *words, "--epochs", 1, "--ckpt", tmp_path / f"{name}.pt",
                 "--init", tmp_path / init, "--lr", "1e-30")
    first = [common.load_model(tmp_path / f"{name}.pt", architecture=f"{path}:{function}")[0]
             for name in "abc"]
    a, b, c = (list(model.net.parameters())[0] for model in first)
    assert torch.equal(a, b) and torch.equal(c, weights["1.weight"]) and not torch.equal(a, c)
    torch.save([1], tmp_path / "no.pt")
    with pytest.raises(common.UsageError, match="nor a state_dict"):
        run_main(sat_rx.main, "sat_rx.py", *words, "--ckpt", tmp_path / "b.pt", "--overwrite",
                 "--init", tmp_path / "no.pt")
    assert (tmp_path / "b.resume.pt").exists()


def test_ckpt_equals_model(net, tmp_path):
    """CKPT=MODEL names the network of a file, where a flag can name many files."""
    path, weights = net
    torch.save(weights, tmp_path / "w=1.pt")
    for text in (f"{tmp_path}/w=1.pt={path}:plain", f"{tmp_path}/w=1.pt"):
        model, _ = common.load_model(text, facts=DIGITS, architecture=f"{path}:plain")
        assert torch.equal(model.net.state_dict()["1.weight"], weights["1.weight"])
    model, _ = common.load_model(f"{tmp_path}/w=1.pt={path}:Wrapped", facts=DIGITS,
                                 architecture="lenet+")
    assert type(model.net).__name__ == "Wrapped"


# ------------------------------------------------------------------------------ the user's file

def test_two_folders_with_neighbours_of_the_same_name(tmp_path):
    """Each file finds its own, by plain and by relative imports; ours do not hide a common.py."""
    for name, classes in (("a", 3), ("b", 5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "common.py").write_text(f"classes = {classes}\n")
        (folder / "sizes.py").write_text(f"classes = {classes}\n")
        (folder / "net.py").write_text(
            "import common\nfrom . import sizes\nfrom torch import nn\n"
            "def make():\n    from .sizes import classes\n    import sizes as again\n"
            "    assert classes == again.classes == common.classes\n"
            "    return nn.Sequential(nn.Flatten(), nn.Linear(784, sizes.classes))\n")
    before = dict(sys.modules), list(sys.path)
    for name, classes in (("a", 3), ("b", 5), ("a", 3)):
        model = common.build_model(f"{tmp_path}/{name}/net.py:make", dict(DIGITS, classes=classes))
        assert model.net[1].out_features == classes
    assert sys.modules["common"] is common and sys.path == before[1]
    assert "sizes" not in sys.modules


def test_the_identity_of_a_network_is_that_of_its_neighbours_too(tmp_path):
    """Its file and what it imports beside itself, by either kind of import; nothing else."""
    (tmp_path / "net.py").write_text("import layers\nfrom . import sizes\nmake = layers.make\n")
    (tmp_path / "layers.py").write_text(
        "from torch import nn\ndef make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n")
    for name in ("sizes", "other"):
        (tmp_path / f"{name}.py").write_text("")
    name = f"{tmp_path}/net.py:make"

    def identity():
        with pytest.raises(common.UsageError, match="missing.py"):  # leaves no trace
            common.build_model(f"{tmp_path}/missing.py:make", DIGITS)
        common.build_model(name, DIGITS)
        return common.code_sha256(name)
    before = identity()
    (tmp_path / "other.py").write_text("# changed\n")
    assert identity() == before
    for changed in ("net", "layers", "sizes"):
        with open(tmp_path / f"{changed}.py", "a") as file:
            file.write("# changed\n")
        assert identity() != before
        before = identity()


def linear_net(folder, before="", scale="1.0"):
    """A network in folder/net.py, and x = the value of `scale` in its forward; its name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(f"{before}\n" + """
import torch
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(784, 10, bias=False))
    def forward(self, x):
""" + f"        {scale}\n        return super().forward(x * scale)\n")
    return f"{folder}/net.py:Net"


def scale_of(name):
    """The scale that a network of `linear_net` uses, and the identity of its code."""
    model = common.build_model(name, DIGITS)
    x = torch.full((1, 1, 28, 28), 0.5)
    ratio = model(x) / model.net[1](x.flatten(1))
    return round(ratio.mean().item(), 3), common.code_sha256(name)


def test_what_is_imported_within_forward(tmp_path):
    """By either kind of import; it counts for the identity, and nothing of it stays."""
    for line in ("from helper import scale", "from .helper import scale"):
        names = [linear_net(tmp_path / folder, scale=line) for folder in "ab"]
        (tmp_path / "a" / "helper.py").write_text("scale = 2.0\n")
        (tmp_path / "b" / "helper.py").write_text("scale = 3.0\n")
        first, second = (common.build_model(name, DIGITS) for name in names)
        x = torch.rand(1, 1, 28, 28)
        for _ in range(2):
            torch.testing.assert_close(1.5 * first(x), second(x))
        assert "helper" not in sys.modules
        before = scale_of(names[0])
        assert before[0] == 2 and scale_of(names[0]) == before
        (tmp_path / "a" / "helper.py").write_text("scale = 2.0  # the same\n")
        again = scale_of(names[0])
        assert again[0] == 2 and again[1] != before[1]


@pytest.mark.parametrize("before", [
    "import os, sys\nsys.path.append(os.path.dirname(os.path.dirname(__file__)))\n"
    "from layers.parts import scale as own",
    "from sub.parts import scale as own"])
def test_what_lies_elsewhere_belongs_to_its_file(tmp_path, before):
    """Above the folder, by sys.path, and in packages without __init__.py: each has its own."""
    names = []
    for folder, scale in (("a", 2.0), ("b", 3.0)):
        root = tmp_path / folder
        names.append(linear_net(root / "src", before, "scale = own"))
        for package in (root / "layers", root / "src" / "sub"):
            package.mkdir()
            (package / "parts.py").write_text(f"scale = {scale}\n")
    paths = list(sys.path)
    found = [scale_of(name) for name in names]
    assert [scale for scale, _ in found] == [2, 3] and sys.path == paths
    for package in ("layers", "src/sub"):
        (tmp_path / "a" / package / "parts.py").write_text("scale = 2.0  # the same\n")
    assert scale_of(names[0])[1] != found[0][1] and scale_of(names[1]) == found[1]


def test_the_identity_has_the_names_of_the_files(tmp_path):
    """The same bytes in another file are another network."""
    name = linear_net(tmp_path, "import one, two", "scale = getattr(one, 'scale', 1.0)")
    found = []
    for one, two in (("scale = 2.0\n", ""), ("", "scale = 2.0\n")):
        (tmp_path / "one.py").write_text(one)
        (tmp_path / "two.py").write_text(two)
        found.append(scale_of(name))
    assert [scale for scale, _ in found] == [2, 1] and found[0][1] != found[1][1]


def test_what_a_network_reads_counts_for_its_identity(tmp_path, monkeypatch):
    """A table beside it, settings in the present folder; not what it writes, nor other files."""
    monkeypatch.chdir(tmp_path)
    before = ("import json, numpy, os\ntable = numpy.load(os.path.join(os.path.dirname(__file__), "
              "'table.npy'))\nopen('log', 'w').write('read')")
    name = linear_net(tmp_path / "src", before,
                      "scale = float(table) * json.load(open('settings.json'))")
    def write(factor):
        np.save(tmp_path / "src" / "table.npy", np.float64(factor))
        (tmp_path / "settings.json").write_text("3")
    write(2)
    first = scale_of(name)
    (tmp_path / "src" / "other.txt").write_text("not read")
    (tmp_path / "log").write_text("changed")
    assert scale_of(name) == first and first[0] == 6
    (tmp_path / "settings.json").write_text("5")
    second = scale_of(name)
    write(4)
    third = scale_of(name)
    assert (second[0], third[0]) == (10, 12) and len({first[1], second[1], third[1]}) == 3


def test_a_file_that_imports_torchvision_beside_a_torch_for_cpus(tmp_path, monkeypatch):
    """Its missing operators are declared, as for our own use of it."""
    name = linear_net(tmp_path, "import sys\nif not sys.test_declared:\n    raise RuntimeError("
                      "'operator torchvision::nms does not exist')", "scale = 1.0")
    monkeypatch.setattr(sys, "test_declared", [], raising=False)
    with pytest.raises(common.UsageError, match="RuntimeError: operator"):
        with monkeypatch.context() as patch:
            patch.setattr(common, "import_torchvision", lambda: None)
            common.build_model(name, DIGITS)
    monkeypatch.setattr(common, "import_torchvision", lambda: sys.test_declared.append(1))
    common.build_model(name, DIGITS)
    assert sys.test_declared == [1]


def test_packages_installed_below_the_folder_are_imported_once(tmp_path, monkeypatch):
    """A virtual environment beside net.py: what registers itself on import does so once."""
    packages = tmp_path / ".venv" / "lib" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "registers_once.py").write_text(
        "import sys\nsys.test_imports = getattr(sys, 'test_imports', 0) + 1\n")
    (tmp_path / "net.py").write_text("import registers_once\n" + NET)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(sys, "test_imports", 0, raising=False)
    for _ in range(2):
        common.build_model(f"{tmp_path}/net.py:plain", DIGITS)
    assert sys.test_imports == 1
    monkeypatch.delitem(sys.modules, "registers_once")


def test_what_a_file_may_do(tmp_path):
    """It may leave, change torch's defaults, and keep a network instead of a function."""
    (tmp_path / "net.py").write_text(
        "import sys, torch\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))\n"
        "def leave():\n    sys.exit('not today')\n")
    model = common.build_model(f"{tmp_path}/net.py:network", DIGITS)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert model(torch.rand(2, 1, 28, 28)).dtype == torch.float32, "computed in float64"
    with pytest.raises(common.UsageError, match="SystemExit: not today"):
        common.build_model(f"{tmp_path}/net.py:leave", DIGITS)


class InPlace(nn.Module):
    """Half precision, and a forward that changes its input and uses view()."""

    def __init__(self, dtype):
        super().__init__()
        self.layer = nn.Linear(784, 10, dtype=dtype)

    def forward(self, x):
        x.mul_(0.5)
        return self.layer(x.view(len(x), -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_foreign_network_gets_a_copy_in_its_own_precision(dtype):
    net = InPlace(dtype)
    model = common.Classifier(net, "none", (0.0,), (1.0,), foreign=True)
    x = torch.rand(6, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    gradient, logits = common.input_gradient(model, x, torch.arange(6))
    assert torch.equal(x, before)
    assert logits.dtype == gradient.dtype == torch.float32 and gradient.abs().sum() > 0
    expected = net.layer(x.contiguous().flatten(1).to(dtype) * 0.5)
    torch.testing.assert_close(logits, expected.float().detach(), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------- the user's networks

ODD = NET + """
import torch

class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.LazyLinear(8), nn.BatchNorm1d(8), nn.Linear(8, 10))

class Masked(Inner):  # the same mask in every forward, drawn from a seed
    def forward(self, x):
        torch.manual_seed(3)
        return super().forward(x * torch.bernoulli(torch.full((28, 28), 0.5)))

class Dropout(Inner):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x))

class Elsewhere(Inner):
    def forward(self, x):
        raise AssertionError("Torch not compiled with CUDA enabled")

class Listed(Inner):  # layers that state_dict does not see
    def __init__(self):
        super().__init__()
        self.blocks = [nn.Linear(784, 784)]
    def forward(self, x):
        return super().forward(self.blocks[0](x.flatten(1)))

class Projected(Inner):
    def __init__(self):
        super().__init__()
        self.register_buffer("p", torch.randn(784), persistent=False)
    def forward(self, x):
        return super().forward(x.flatten(1) * self.p)

class FirstSeen(Inner):  # the mean of the first images, which may be anybody's
    mean = None
    def forward(self, x):
        if self.mean is None:
            self.mean = x.detach().mean(0)
        return super().forward(x - self.mean)

class Wrapped(torch.Tensor):
    pass

class OwnTensor(Inner):
    def forward(self, x):
        return super().forward(x).as_subclass(Wrapped)

class Fixed(Projected):
    def __init__(self):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            super().__init__()

class Counts(Inner):  # other logits each time, by numbers of its own
    calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x * self.calls)

class Temperature(Inner):
    def __init__(self):
        nn.Module.__init__(self)
        self.temperature = nn.Parameter(torch.ones((), dtype=torch.float64))
        for i, layer in enumerate(Inner()):
            self.add_module(str(i), layer)
    def forward(self, x):
        for layer in list(self.children()):
            x = layer(x)
        return x / self.temperature.float()

class Part(Inner):  # its state_dict is not whole
    def state_dict(self, *args, **options):
        state = super().state_dict(*args, **options)
        return {name: value for name, value in state.items() if name.startswith("3.")}

class Trains(Inner):
    def train(self, loader):
        for x, y in loader:
            pass

class Needs(Inner):
    def __init__(self):
        import models_elsewhere

class Configured(Inner):
    def __init__(self, config):
        super().__init__()

def meta():
    with torch.device("meta"):
        return Inner()
"""


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(ODD)
    return path


def test_lazy_layers(net, odd, tmp_path):
    _, weights = net
    found = opened(tmp_path / "w.pt", weights, f"{odd}:Lazy")
    assert all(torch.equal(a, b) for a, b in zip(found, weights.values()))


def test_a_forward_that_sets_the_seed_leaves_the_random_numbers_alone(odd):
    """Its own are as before; a network that only draws is another matter."""
    model = common.build_model(f"{odd}:Masked", DIGITS).eval()
    x = torch.rand(4, 1, 28, 28)
    torch.manual_seed(3)
    mask = torch.bernoulli(torch.full((28, 28), 0.5))
    expected = nn.Sequential.forward(model.net, x * mask)
    torch.manual_seed(5)
    whole = torch.rand(6)
    torch.manual_seed(5)
    first = torch.rand(3)
    logits = model(x)
    assert model.sets_seed and torch.equal(logits, expected)
    assert torch.equal(torch.cat([first, torch.rand(3)]), whole)
    for name in ("Dropout", "plain"):
        assert not common.build_model(f"{odd}:{name}", DIGITS).sets_seed


@pytest.mark.parametrize("function, named", [
    ("Configured", "it needs config: name a function"), ("absent", "odd.py has no 'absent'"),
    ("meta", "device meta"), ("Trains", r"its train\(\) must be torch's"),
    ("Needs", "models_elsewhere.*PYTHONPATH"),
    ("Elsewhere", r"\(1, 1, 28, 28\) \(AssertionError: Torch not comp")])
def test_what_cannot_be_built_says_why(odd, function, named):
    with pytest.raises(common.UsageError, match=named):
        common.build_model(f"{odd}:{function}", DIGITS)


def test_a_file_does_not_change_the_process(odd, tmp_path, monkeypatch):
    """Its folder, default device, threads, strictness about warnings and numbers."""
    monkeypatch.chdir(Path(__file__).parent)

    def settings():
        return (Path.cwd(), torch.get_default_device(), torch.get_num_threads(),
                torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled(),
                list(warnings.filters), np.geterr())
    before = settings()
    odd.write_text(ODD + f"""
import os, warnings
import numpy
os.chdir({str(tmp_path)!r})
torch.set_num_threads({torch.get_num_threads() + 1})
torch.autograd.set_detect_anomaly(True)
torch.use_deterministic_algorithms(True)
warnings.filterwarnings("error")
numpy.seterr(all="raise")
network = Inner()
torch.set_default_device("meta")
changed = os.getcwd()
""")
    common.build_model(f"{odd}:network", DIGITS)
    assert settings() == before


@pytest.mark.parametrize("function", ["Listed", "Projected", "FirstSeen"])
def test_values_that_no_file_holds_are_refused(net, odd, tmp_path, function):
    """Another process would have others. With a seed they are the same."""
    _, weights = net
    with pytest.raises(common.UsageError, match="values that are not among its weights"):
        opened(tmp_path / "w.pt", weights, f"{odd}:{function}")
    for allowed in ("Fixed", "Dropout", "Masked", "Counts", "plain"):
        torch.manual_seed(7)
        opened(tmp_path / "w.pt", weights, f"{odd}:{allowed}")
        drawn = torch.rand(3)
        torch.manual_seed(7)
        common.build_model(f"{odd}:{allowed}", DIGITS)
        assert torch.equal(drawn, torch.rand(3)), "the check draws nothing"


def test_logits_are_plain_tensors(net, odd, tmp_path):
    """Those of the user's own kind would mix with ours, and with those of a second import."""
    _, weights = net
    torch.save(weights, tmp_path / "w.pt")
    model, _ = common.load_model(tmp_path / "w.pt", facts=DIGITS, architecture=f"{odd}:OwnTensor")
    x = torch.rand(3, 1, 28, 28)
    gradient, logits = common.input_gradient(model, x, torch.arange(3))
    assert type(logits) is torch.Tensor and gradient.abs().sum() > 0


def test_a_number_of_another_precision_beside_the_layers(net, odd, tmp_path):
    _, weights = net
    content = dict(weights, temperature=torch.tensor(2.0, dtype=torch.float64))
    torch.save(content, tmp_path / "w.pt")
    model, _ = common.load_model(tmp_path / "w.pt", facts=DIGITS, architecture=f"{odd}:Temperature")
    plain = common.build_model(f"{odd}:plain", DIGITS).eval()
    plain.net.load_state_dict(weights)
    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(2 * model(x), plain(x))


def test_a_state_dict_that_is_not_whole_is_refused_in_words(net, odd, tmp_path):
    _, weights = net
    part = {name: value for name, value in weights.items() if name.startswith("3.")}
    with pytest.raises(common.UsageError, match="do not fit the model .Missing key"):
        opened(tmp_path / "w.pt", part, f"{odd}:Part")
