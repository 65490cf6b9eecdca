"""Trainings for test_processes.py: run alone, or as one of N processes.

    python tests/two_processes.py short OUT SOURCES   # with RANK, WORLD_SIZE ... as torchrun does
    python tests/two_processes.py whole OUT

short: every method of every script for three steps, in float64. BatchNorm is frozen: its batch
would be another one in each process. Writes OUT/NAME.pt. SOURCES: the folder of the run alone,
whose networks serve as sources, teachers and first phases.
whole: a run of each script in float32 on digits; also writes OUT/NAME-RANK.pt, each process's own
network after the last epoch.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

sys.path.insert(0, str(Path(__file__).parent.parent))
import atlas
import common
import dra_finetune
import iaat
import sat_rx
import teacher_saliency

# 25 images in joint batches of 9, 9 and 7: the processes have unlike shares
SHORT = ["--dataset", "digits", "--limit", 25, "--batch-size", 9, "--val", 0, "--epochs", 1]
WRN = ["--model", "wrn-10-1"]
LENET = ["--model", "lenet+"]
SAT = [sat_rx, *SHORT, "--method"]
ATLAS = [atlas, *SHORT, "--guide", "fixed", "--ramp", 0, "--method"]
IAAT = [iaat, *SHORT, "--attack-steps", 3, "--lr-warmup", 0, "--method"]
DRA = [dra_finetune, *SHORT, "--attack-steps", 3, "--method"]
SALIENCY = [teacher_saliency, *SHORT[:-2], "--align-epochs", 1]


def cases(sources):
    """name -> [script, flag ...]. sources: the folder of the run alone."""
    after_vanilla = ["--init", sources / "dra-vanilla.pt"]
    taught = ["--teacher", sources / "saliency-align.teacher.pt", "--ks", 50, "--k-epochs", 1]
    return {
        "sat-nt": [*SAT, "nt", *LENET],
        "sat-fgsm-at": [*SAT, "fgsm-at", *WRN, "--augment", "crop-flip"],
        "sat-rfgsm-at": [*SAT, "rfgsm-at", *WRN],
        "sat-eat": [*SAT, "eat", *LENET, "--source", sources / "sat-nt.pt"],
        "sat-pgd-at": [*SAT, "pgd-at", *WRN, "--attack-steps", 3],
        "sat-trades": [*SAT, "trades", *WRN, "--attack-steps", 3],
        "sat-r1": [*SAT, "r1", *WRN, "--attack-steps", 3],
        "sat-r1-3": [*SAT, "r1", *LENET, "--attack-steps", 3, "--k", 3, "--ce-all"],
        "sat-r2": [*SAT, "r2", *WRN],
        "sat-r3": [*SAT, "r3", *WRN, "--tau", 0.9],
        "atlas-atlas": [*ATLAS, "atlas", *WRN, "--alpha", 1e-2],
        "atlas-adv": [*ATLAS, "adv", *LENET],
        "atlas-trades": [*ATLAS, "trades", *WRN, "--steps", 3],
        "atlas-jac": [*ATLAS[:-3], "--method", "jac", *LENET, "--alpha", 1e-2],
        "atlas-tradesjac": [*ATLAS, "tradesjac", *WRN],
        "iaat-iaat": [*IAAT, "iaat", *WRN, "--warmup", 0],
        "iaat-line-search": [*IAAT, "line-search", *LENET, "--warmup", 0],
        "iaat-pgd-at": [*IAAT, "pgd-at", *WRN, "--targeted", "--augment", "reflect-flip"],
        "iaat-mixup": [*IAAT, "mixup", *WRN],
        "iaat-clean": [iaat, *SHORT, "--method", "clean", *LENET],
        "dra-vanilla": [dra_finetune, *SHORT, "--method", "vanilla", *WRN],
        "dra-finetune": [*DRA, "finetune", *WRN, *after_vanilla],
        "dra-dual": [*DRA, "dual", *WRN, *after_vanilla],
        "dra-madry": [*DRA, "madry", *LENET],
        "dra-trades": [*DRA, "trades", *WRN],
        "dra-mart": [*DRA, "mart", *WRN],
        "saliency-nt": [*SALIENCY, "--method", "nt", *WRN, "--input-noise", 0.1],
        "saliency-align": [*SALIENCY, "--method", "align", *WRN, "--teacher-epochs", 1,
                           "--teacher-warmup", 0, "--attack-steps", 3],
        "saliency-curriculum": [*SALIENCY, *WRN, *taught, "--ldiff-scale", "family"],
    }


REAL = ["--dataset", "digits", "--model", f"{__file__}:small_net", "--limit", 600,
        "--batch-size", 20, "--val", 140, "--precision", "float32", "--lr", 0.05]
WHOLE = {
    "sat": [sat_rx, *REAL, "--method", "r3", "--epochs", 3],
    "atlas": [atlas, *REAL, "--method", "adv", "--ramp", 2, "--epochs", 3],
    "iaat": [iaat, *REAL, "--warmup", 1, "--epochs", 3, "--attack-steps", 2],
    "dra": [dra_finetune, *REAL, "--pretrain-epochs", 3, "--epochs", 2, "--attack-steps", 2],
    "saliency": [teacher_saliency, *REAL, "--teacher-epochs", 1, "--align-epochs", 3, "--ks", 50,
                 "--k-epochs", 1, "--attack-steps", 1, "--gamma", 0.1, "--gamma2", 0.1],
}


def small_net():
    """Two convolutions with BatchNorm, for digits."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 49, 10))


def frozen(self, x):
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                        eps=self.eps)


def to_double(images):
    return images.double().div_(255).contiguous(memory_format=torch.channels_last)


def keep_own_network(out, rank):
    """Have every finish_epoch write this process's network to OUT/NAME-RANK.pt, too."""
    real = common.Run.finish_epoch

    def finish_epoch(run, model, *args, **named):
        torch.save(model.state_dict(), out / f"{run.path.stem}-{rank}.pt")
        real(run, model, *args, **named)
    common.Run.finish_epoch = finish_epoch


def main():
    torch.set_num_threads(1)
    rank, size = common.ranks()
    if size > 1:
        torch.distributed.init_process_group("gloo")
    common.set_up = lambda *_, **__: (torch.device("cpu"), "float32")
    out = Path(sys.argv[2])
    if sys.argv[1] == "short":
        torch.set_default_dtype(torch.float64)
        _BatchNorm.forward = frozen
        common.to_float = to_double
        runs = cases(Path(sys.argv[3]))
    else:
        keep_own_network(out, rank)
        runs = WHOLE
    for name, (script, *words) in runs.items():
        sys.argv = [f"{script.__name__}.py", *map(str, words), "--ckpt", str(out / f"{name}.pt"),
                    "--wandb", "disabled"]
        script.main()


if __name__ == "__main__":
    common.cli(main)
