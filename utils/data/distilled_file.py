"""The file of distilled sets, `res_….pt`, and that of stage 2, `trained_on.pt`: its reader and writer.

It is a dict in the layout of the published code: `data`, a list of `[images, labels]` per experiment, and with outliers
`data_oe`, a list of `[outliers, zeros]` (CPU, float32, normalised; int64); `accs_all_exps`, lists of accuracies by
evaluation model. Published files lack the others: `normalisation` (`mean`, `std`; with `--zca` also `zca`), `lr_net`
(MTT: the learning rate of each experiment), `soft_labels` (probabilities `[N, num_classes]` of each experiment, where
`labels` has the most probable class), `factor` (of images in parts), `dataset`, `num_classes`, `class_names`, `about`
(the run), `version`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from utils.compute.version import VERSION
from utils.core.errors import require
from utils.core.files import save_pt
from utils.core.torch_files import PLAIN_INTEGERS, PLAIN_TENSORS, read_pt
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet, check_factor, in_classes_of, is_probabilities
from utils.data.whitening import ZCA

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation, per channel


def result_name(method: str, dataset: str, model: str, ipc: int) -> str:
    """The file name of a distilled set."""
    return f"res_{method}_{dataset}_{model}_{ipc}ipc.pt"


class Normalisation(NamedTuple):
    """What the numbers of stored images are."""

    space: str | None = None  # normalised, zca, or unit (pixels); None where nothing is stated
    statistics: Statistics | None = None  # of normalised images
    zca: ZCA | None = None  # of whitened images

    @property
    def fill(self) -> float:
        """The grey that pads a side of an image which its parts do not divide."""
        return 0.5 if self.space == "unit" else 0.0

    @classmethod
    def read(cls, stored: object, path: Path) -> "Normalisation":
        """Check what the file `path` stores, mean and std, or zca; a `UserError` tells that it is damaged."""
        if stored is None:
            return NOT_STATED
        try:
            if "zca" in stored:
                zca = ZCA(*(stored["zca"][name].float() for name in ("mean", "matrix", "inverse")))
                found, size = cls("zca", None, zca), len(zca.mean)
                fits = all(m.shape == (size, size) and m.isfinite().all() for m in (zca.matrix, zca.inverse))
            else:
                mean, std = (tuple(map(float, stored[name])) for name in ("mean", "std"))
                found = cls("normalised", (mean, std))
                fits = len(mean) == len(std) and min(std) > 0 and all(map(math.isfinite, mean + std))
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            fits = False
        require(fits, f"{path} is damaged: its normalisation must be mean and std, or zca; write it again")
        return found

    def is_of(self, real: RealData) -> bool:
        """Whether images of this kind are normalised or whitened as those of `real`, up to rounding."""
        if self.zca is not None:
            return real.zca is not None and real.zca.to("cpu").is_close(self.zca)
        pairs = zip(self.statistics or (), (real.mean, real.std), strict=False)
        fits = all(len(a) == len(b) and np.allclose(a, b, rtol=1e-5, atol=0) for a, b in pairs)
        return self.space == "normalised" and real.zca is None and fits

    def to_unit(self, images: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation or the whitening of images; the numbers are not clipped to [0, 1]."""
        if self.zca is not None:
            return self.zca.undo(images)
        if self.space == "unit":
            return images
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in self.statistics)
        return images * std + mean


NOT_STATED = Normalisation()


class DistilledFile:
    """A `res_….pt` that was opened. Its sets are checked when they are asked for."""

    def __init__(self, path: Path, content: object):
        has_data = isinstance(content, dict) and isinstance(content.get("data"), list)
        require(has_data, f"{path} is no distilled set: it has no list 'data'. Give the res_….pt file of stage 1")
        self.path = path
        # what the file says of its data, unchecked; None where it says nothing
        self.dataset, self.num_classes, self.class_names = map(content.get, ("dataset", "num_classes", "class_names"))
        self.decoded = content.get("decoded", 1)  # parts a side that were made images of their own, by publish.py
        self._content = content

    @classmethod
    def open(cls, path: str | Path, flag: str = "distilled set") -> "DistilledFile":
        """Read the file; a `UserError`, which `flag` begins, tells of damage."""
        return cls(Path(path), read_pt(path, flag))

    @staticmethod
    def write(
        path: Path, sets: Sequence[SyntheticSet], accs: dict[str, list[float]], real: RealData, about: dict
    ) -> None:
        """Write the sets of all experiments so far, their accuracies in [0, 1] by evaluation model, and on the run."""
        normalisation: dict = {"mean": list(real.mean), "std": list(real.std)}
        if real.zca is not None:
            normalisation["zca"] = {n: getattr(real.zca, n).cpu() for n in ("mean", "matrix", "inverse")}
        content: dict = {"data": [[s.images, s.hard_labels] for s in sets], "accs_all_exps": accs}
        first = sets[0]
        if first.images_oe is not None:
            content["data_oe"] = [[s.images_oe, torch.zeros(len(s.images_oe), dtype=torch.int64)] for s in sets]
        if first.labels.is_floating_point():
            content["soft_labels"] = [s.labels for s in sets]
        if any(s.lr_net is not None for s in sets):
            content["lr_net"] = [s.lr_net for s in sets]
        content |= {"normalisation": normalisation, "dataset": real.name, "num_classes": real.num_classes}
        content["class_names"] = list(real.class_names)
        if first.factor > 1:
            content["factor"] = first.factor
        save_pt(path, content | {"about": about, "version": VERSION})

    def normalisation(self) -> Normalisation:
        """What the file states of the space of its images; a `UserError` tells that it is damaged."""
        return Normalisation.read(self._content.get("normalisation"), self.path)

    def iterations_left(self, exp_idx: int = 0) -> tuple[int, int] | None:
        """Where an experiment stands whose run was stopped: its iteration, and `--Iteration`; None: it is finished."""
        try:
            about = self._content["about"]
            done, total = about["iteration"], about["flags"]["Iteration"]
            return (done, total) if about["experiment"] == exp_idx and done < total else None
        except (KeyError, TypeError):  # the file does not say, as those of the published code
            return None

    def unfinished_note(self, exp_idx: int = 0) -> str:
        """A line for the log where the run of an experiment was not finished; else it is empty."""
        left = self.iterations_left(exp_idx)
        return f"its run was not finished: iteration {left[0]} of {left[1]}" if left else ""

    def set(self, exp_idx: int = 0, real: RealData | None = None) -> SyntheticSet:
        """The set of one experiment; a `UserError` tells that there is none, or it is damaged or of other data.

        If `real` is given, the set must match it, and its classes are brought into the order of those of `real`.
        """
        content, count, damaged = self._content, len(self._content["data"]), f"{self.path} is damaged:"
        require(0 <= exp_idx < count, f"--exp_idx {exp_idx}: {self.path} holds {count} experiments, counted from 0")
        images, labels = self._pair("data", exp_idx)
        images_oe, lr_net = None, None
        if "data_oe" in content:
            images_oe, _ = self._pair("data_oe", exp_idx)
        if "soft_labels" in content:
            soft = self._entry("soft_labels", exp_idx)
            is_plain = isinstance(soft, torch.Tensor) and soft.dtype in PLAIN_TENSORS
            fits = is_plain and tuple(soft.shape) == (len(images), self.num_classes)
            require(fits, f"{damaged} its soft labels must be floating [images, classes] for each experiment")
            require(is_probabilities(soft.float()), f"{damaged} its soft labels are not probabilities")
            labels = soft.float()
        if content.get("lr_net") is not None:
            lr_net = self._entry("lr_net", exp_idx)
            is_rate = isinstance(lr_net, (int, float, np.number)) and 0 < lr_net < math.inf
            require(is_rate, f"{damaged} its learning rate must be a positive number for each experiment")
            lr_net = float(lr_net)
        factor = check_factor(content.get("factor", 1), tuple(images.shape[2:]), f"{damaged} factor")
        synthetic = SyntheticSet(images, labels, images_oe, lr_net, factor=factor)
        return synthetic if real is None else self._checked(synthetic, real)

    def start(self, real: RealData, ipc: int, with_outliers: bool, factor: int = 1) -> list[SyntheticSet]:
        """The sets of all experiments, for a distillation to start from; a `UserError` tells that one does not fit."""
        sets = [self.set(exp_idx, real) for exp_idx in range(max(1, len(self._content["data"])))]
        order = torch.arange(real.num_classes).repeat_interleave(ipc)
        for one in sets:
            told = f"{self.path} does not have {ipc} images of each class, in order; give its --ipc"
            require(torch.equal(one.labels, order), told)
            told = f"{self.path} has images of {one.factor}x{one.factor} parts; give --factor {one.factor}"
            require(one.factor == factor, told)
            has_outliers = one.images_oe is not None and one.images_oe.shape == one.images.shape
            told = f"{self.path} has no outliers to start from; give a set of main_oe.py or main_poe.py"
            require(has_outliers or not with_outliers, told)
        return sets

    def _entry(self, key: str, exp_idx: int) -> object:
        """What the list `key` holds for an experiment; None if there is nothing."""
        stored = self._content[key]
        return stored[exp_idx] if isinstance(stored, list) and exp_idx < len(stored) else None

    def _pair(self, key: str, exp_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of one experiment, checked."""
        entry, begin = self._entry(key, exp_idx), f"{self.path} is no distilled set:"
        is_pair = isinstance(entry, (list, tuple)) and [isinstance(t, torch.Tensor) for t in entry] == [True, True]
        require(is_pair, f"{begin} experiment {exp_idx} of '{key}' is not a pair of images and labels")
        images, labels = (t.detach() for t in entry)
        kinds = images.dtype in PLAIN_TENSORS and labels.dtype in PLAIN_INTEGERS
        require(
            kinds and images.ndim == 4 and labels.shape == images.shape[:1] and images.numel(),
            f"{begin} images {list(images.shape[:8])} {images.dtype}, labels {list(labels.shape[:8])} {labels.dtype}; "
            "they must be floating [N, C, H, W] and integers [N]",
        )
        images, labels = images.float(), labels.long()
        told = f"{self.path} is damaged: images must be finite and labels whole numbers from 0"
        require(torch.isfinite(images).all() and labels.min() >= 0, told)
        return images, labels

    def _checked(self, synthetic: SyntheticSet, real: RealData) -> SyntheticSet:
        """The set in the classes of `real`, if name, shape, classes and normalisation are those of `real`."""
        images, labels, path = synthetic.images, synthetic.labels, self.path
        dataset = self._content.get("dataset", real.name)
        known = torch.arange(labels.shape[1]) if labels.is_floating_point() else labels.unique()
        shape, wanted = ("x".join(map(str, s)) for s in (images.shape[1:], (real.channel, *real.im_size)))
        is_other_size = dataset == "ImageFolder" and images.shape[-1] != real.im_size[-1]
        cure = f". Give --im_size {images.shape[-1]}" if is_other_size else ""
        require(
            dataset == real.name and shape == wanted and torch.equal(known, torch.arange(real.num_classes)),
            f"--dataset {real.name}: {path} was distilled from {dataset[:40] if isinstance(dataset, str) else '?'} "
            f"({len(known)} classes, {known[0]}..{known[-1]}, images {shape}), not from {real.num_classes} classes of "
            f"{wanted}{cure}",
        )
        synthetic = in_classes_of(real.class_names, synthetic, self.class_names, str(path))
        stored = self.normalisation()
        how = "with it; give" if stored.zca else "without it; leave out"
        require((stored.zca is None) == (real.zca is None), f"--zca: {path} was made {how} --zca")
        told = (
            f"--dataset {real.name}: {path} was distilled from other data: the mean and deviation stored in it differ"
        )
        if stored.zca:
            told = f"--zca: {path} was whitened by another data set"
        fits = stored.space is None or stored.is_of(real)
        require(fits, f"{told}. Give the data that it was distilled from (--data_path)")
        return synthetic
