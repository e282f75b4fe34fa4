"""Expert trajectories for trajectory matching (Cazenavette et al., CVPR 2022): their files.

An expert is a network trained on the real set; its trajectory is its parameters before the first epoch and after each.
The files have the published layout: `<buffer_path>/<dataset>[_NO_ZCA]/<model>/replay_buffer_<n>.pt` is a list of
trajectories, each a list of epochs, each a list of parameter tensors in parameter order, float32 on the CPU.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from networks import has_batchnorm
from utils.core.errors import UserError
from utils.core.files import read_json
from utils.core.rng import generator
from utils.core.torch_files import fingerprint, read_pt
from utils.data.datasets import RealData
from utils.training.trainer import Trainer, TrainSettings, accuracy_of

ABOUT = "experts.json"
Params = list[Tensor]


def expert_folder(buffer_path: str | Path, real: RealData, model: str) -> Path:
    """The folder of the experts of a model on a data set, named as in published buffers."""
    zca = "" if real.zca is not None else "_NO_ZCA"
    return Path(buffer_path) / f"{real.name}{zca}" / model


def describe(real: RealData, model: str, outliers: Mapping | None, lambda_oe: float | None = None) -> dict:
    """What experts and a distillation must have in common, stored in `experts.json`.

    `outliers`: what their source says of itself; `lambda_oe`: their weight.
    """
    return {
        "dataset": real.name,
        "model": model,
        "mean": list(real.mean),
        "std": list(real.std),
        "class_names": list(real.class_names),
        "class_sizes": real.labels_train.bincount().tolist(),
        "zca": real.zca is not None,
        "outliers": {"kind": "none"} if outliers is None else {**outliers, "lambda_oe": lambda_oe},
    }


def check_about(folder: Path, expected: dict) -> bool:
    """Compare `experts.json` with what is expected; False if there is none, as in published buffers."""
    if not (folder / ABOUT).exists():
        return False
    stored = read_json(folder / ABOUT, "--buffer_path")
    for name, wanted in expected.items():
        found = stored.get(name)
        unknown = name in ("class_names", "class_sizes", "num_oe_per_class") and not (wanted and found)  # older files
        if unknown or found == wanted:
            continue
        if isinstance(found, dict) and isinstance(wanted, dict):  # name only what differs
            names = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
            found, wanted = ({n: values.get(n) for n in names} for values in (found, wanted))
        raise UserError(
            f"--buffer_path: the experts in {folder} are of another kind: {name} {json.dumps(found)[:120]} instead of "
            f"{json.dumps(wanted)[:120]}. Give the --buffer_path of the right ones, or another"
        )
    return True


class ExpertBuffer:
    """The trajectories in a folder. They stay on the disk: a segment reads two epochs of one of them.

    `shapes`: of the network's parameters, in order. `most`: use only so many experts, the first ones; None for all.
    `how_to_make`: the command for the message if there are none.
    """

    def __init__(self, folder: Path, shapes: Sequence[torch.Size], most: int | None, how_to_make: str):
        self.paths = sorted(folder.glob("replay_buffer_*.pt"), key=lambda p: (len(p.name), p.name))
        if not self.paths:
            raise UserError(f"--buffer_path: no experts in {folder}; make them: {how_to_make}")
        self.folder, self.shapes = folder, [tuple(s) for s in shapes]
        self.trajectories: list[tuple[Path, list[Params]]] = []
        for path in self.paths:
            self.trajectories += [(path, trajectory) for trajectory in self._read(path)]
            if most is not None and len(self.trajectories) >= most:
                self.trajectories = self.trajectories[:most]
                break
        self.epochs = min(len(trajectory) for _, trajectory in self.trajectories) - 1

    def _read(self, path: Path) -> list[list[Params]]:
        """The trajectories of a file, memory-mapped and checked by shape."""
        content = read_pt(path, "--buffer_path", mmap=True)
        lists = isinstance(content, list) and content and all(isinstance(t, list) and t for t in content)
        if not lists or not all(isinstance(epoch, list) for t in content for epoch in t):
            raise UserError(f"--buffer_path: {path} is no buffer, a list of trajectories; make it again")
        for epoch in (epoch for trajectory in content for epoch in trajectory):
            if [tuple(p.shape) if isinstance(p, Tensor) else None for p in epoch] != self.shapes:
                raise UserError(f"--buffer_path: {path} has experts of another --model or data set")
        return content

    def fingerprint(self) -> str:
        """SHA-256 over the trajectories: of each, the first parameter tensor of its last epoch."""
        return fingerprint(trajectory[-1][0] for _, trajectory in self.trajectories)

    def segment(self, g: torch.Generator, max_start: int, length: int, device: torch.device) -> tuple[Params, Params]:
        """The parameters at a random start epoch below `max_start` of a random expert, and `length` epochs later."""
        index = int(torch.randint(len(self.trajectories), (1,), generator=g))
        start = int(torch.randint(max_start, (1,), generator=g))
        return self.snapshot(index, start, device), self.snapshot(index, start + length, device)

    def snapshot(self, index: int, epoch: int, device: torch.device) -> Params:
        """The parameters of an expert after `epoch` epochs; a `UserError` tells that they are not finite."""
        path, trajectory = self.trajectories[index]
        if not all(torch.isfinite(p).all() for p in trajectory[epoch]):  # on the CPU, so that a GPU is not waited for
            raise UserError(f"--buffer_path: {path} holds NaN or infinite numbers at epoch {epoch}; make it again")
        return [p.detach().to(device, torch.float32, copy=True) for p in trajectory[epoch]]

    def accuracy(self, real: RealData, model: str) -> float | None:
        """The test accuracy of the first expert after its last epoch, a fraction.

        None if its parameters are not finite, or with BatchNorm, whose statistics buffers lack.
        """
        net, last = real.network(model, generator(0)), self.trajectories[0][1][-1]
        if has_batchnorm(net) or not all(torch.isfinite(parameter).all() for parameter in last):
            return None
        net.load_state_dict(dict(zip(dict(net.named_parameters()), last, strict=True)))
        logits = Trainer(net.to(real.device), TrainSettings(1)).predict(real.test_images)
        return accuracy_of(logits, real.labels_test)


def without_running_statistics(net: nn.Module) -> nn.Module:
    """Let BatchNorm use batch statistics only: expert buffers hold parameters, but no running statistics."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return net
