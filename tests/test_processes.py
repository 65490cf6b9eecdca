"""Several processes under torchrun: they train as one would, agree, resume, and fail in a line."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
from two_processes import WHOLE, cases

ROOT = Path(__file__).parent.parent


def start(command, size=1):
    """`size` processes of a command, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(size):
        env = dict(os.environ, OMP_NUM_THREADS="1", WANDB_MODE="disabled")
        if size > 1:
            env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        found.append(subprocess.Popen(
            [sys.executable, *map(str, command)], env=env, cwd=ROOT, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    return found


def finish(processes):
    """(standard output of all, standard error of all); all must have ended well."""
    texts = [process.communicate(timeout=600) for process in processes]
    for process, (_, err) in zip(processes, texts):
        assert process.returncode == 0, err
    return "".join(out for out, _ in texts), "".join(err for _, err in texts)


def last_weights(path):
    return torch.load(path, weights_only=True)["last"]["state_dict"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(folder of the runs alone, folder of the runs of two processes)."""
    alone = tmp_path_factory.mktemp("alone")
    two = tmp_path_factory.mktemp("two")
    finish(start(["tests/two_processes.py", "short", alone, alone]))
    finish(start(["tests/two_processes.py", "short", two, alone], size=2))
    return alone, two


@pytest.mark.parametrize("name", cases(Path()))
def test_two_processes_train_as_one(both, name):
    """The same joint batches, in float64, frozen BatchNorm: the same weights after three steps."""
    alone, two = (last_weights(folder / f"{name}.pt") for folder in both)
    for key, value in alone.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-8, msg=f"{name}: {key}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of whole runs alone, folder of those of two processes)."""
    alone = tmp_path_factory.mktemp("alone")
    two = tmp_path_factory.mktemp("two")
    finish(start(["tests/two_processes.py", "whole", alone]))
    out, _ = finish(start(["tests/two_processes.py", "whole", two], size=2))
    return alone, two


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_agree(whole, name):
    """Weights and BatchNorm's buffers are the same on both, bit for bit; the accuracy is near that
    of one process, whose BatchNorm sees the joint batch."""
    alone, two = whole
    networks = [torch.load(two / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert any("running_var" in key for key in networks[0])
    for key, value in networks[0].items():
        assert torch.equal(value, networks[1][key]), key
    saved = last_weights(two / f"{name}.pt")
    assert all(torch.equal(value, networks[0][f"net.{key}"]) for key, value in saved.items())
    clean = [torch.load(folder / f"{name}.pt", weights_only=True)["history"][-1]["val/clean"]
             for folder in (alone, two)]
    assert clean[0] > 0.3 and clean[1] == pytest.approx(clean[0], abs=0.2), clean


def test_killed_and_resumed_under_torchrun(tmp_path):
    """SIGKILL of both after a save, then --resume: the weights of an uninterrupted run."""
    command = ["sat_rx.py", "--dataset", "digits", "--model", "cnn-small", "--limit", 100,
               "--val", 20, "--method", "r2", "--epochs", 15, "--precision", "float32", "--ckpt"]
    finish(start([*command, tmp_path / "whole.pt"], size=2))
    processes = start([*command, tmp_path / "cut.pt"], size=2)
    while not (tmp_path / "cut.resume.pt").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = torch.load(tmp_path / "cut.resume.pt", weights_only=True)["last"]["epoch"]
    assert 1 <= done < 15, "killed too late to show anything"
    out, _ = finish(start([*command, tmp_path / "cut.pt", "--resume"], size=2))
    assert out.count(f"goes on after epoch {done}") == 1
    whole = last_weights(tmp_path / "whole.pt")
    for key, value in last_weights(tmp_path / "cut.pt").items():
        assert torch.equal(value, whole[key]), key


def test_a_failure_is_told_once(tmp_path):
    """Under torchrun, where all processes see it; the others are ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", "sat_rx.py", "--dataset", "digits", "--model", "cnn-small", "--limit", "60",
               "--method", "nt", "--lr", "1e38", "--ckpt", tmp_path / "run.pt"]
    env = dict(os.environ, OMP_NUM_THREADS="1", WANDB_MODE="disabled")
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "epoch" in told[0], done.stderr
    assert not (tmp_path / "run.pt").exists() and not (tmp_path / "run.pt.lock").exists()


def test_evaluation_is_one_process(monkeypatch):
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(common.UsageError, match="torchrun"):
        common.set_up("cpu", parallel=False)
