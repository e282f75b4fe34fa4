"""The file of distilled sets, `res_….pt`: its one reader and writer.

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
from utils.data.identity import class_order
from utils.data.synthetic import SyntheticSet, check_factor, in_classes_of, is_probabilities
from utils.data.whitening import ZCA

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation, per channel


def result_name(method: str, dataset: str, model: str, ipc: int) -> str:
    """The file name of a distilled set."""
    return f"res_{method}_{dataset}_{model}_{ipc}ipc.pt"


class Normalisation(NamedTuple):
    """What a file states of the space of its images."""

    space: str | None = None  # normalised or zca; None where the file states nothing
    statistics: Statistics | None = None  # of normalised images
    zca: ZCA | None = None  # of whitened images

    @classmethod
    def read(cls, stored: object, path: Path) -> "Normalisation":
        """Check what the file `path` stores, mean and std, or zca; a `UserError` tells that it is damaged."""
        if stored is None:
            return cls()
        damaged = f"{path} is damaged: its normalisation must be mean and std, or zca; write it again"
        require(isinstance(stored, dict), damaged)
        if "zca" in stored:
            zca = _whitening(stored["zca"])
            require(zca is not None, damaged)
            return cls("zca", None, zca)
        mean, std = stored.get("mean"), stored.get("std")
        require(_are_floats(mean) and _are_floats(std) and len(mean) == len(std) and min(std) > 0, damaged)
        return cls("normalised", (tuple(mean), tuple(std)))


def _whitening(stored: object) -> ZCA | None:
    """The whitening that a file stores; None if it is damaged."""
    parts = [stored.get(name) for name in ("mean", "matrix", "inverse")] if isinstance(stored, dict) else [None]
    if not all(isinstance(t, torch.Tensor) and t.dtype in PLAIN_TENSORS for t in parts):
        return None
    mean, matrix, inverse = (t.float() for t in parts)
    shape = (len(mean), len(mean)) if mean.ndim == 1 else None
    fits = all(m.shape == shape and torch.isfinite(m).all() for m in (matrix, inverse))
    return ZCA(mean, matrix, inverse) if fits else None


def _are_floats(values: object) -> bool:
    """Whether a value of a file is a list of finite numbers."""
    is_list = isinstance(values, (list, tuple)) and len(values) > 0
    return is_list and all(isinstance(x, float) and math.isfinite(x) for x in values)


class DistilledFile:
    """A `res_….pt` that was opened. Its sets are checked when they are asked for."""

    def __init__(self, path: Path, content: object):
        has_data = isinstance(content, dict) and isinstance(content.get("data"), list)
        require(has_data, f"{path} is no distilled set: it has no list 'data'. Give the res_….pt file of stage 1")
        self.path = path
        self.num_experiments = len(content["data"])
        # what the file says of its data, unchecked; None where it says nothing
        self.dataset, self.num_classes, self.class_names = map(content.get, ("dataset", "num_classes", "class_names"))
        self._content = content

    @classmethod
    def open(cls, path: str | Path, flag: str = "distilled set") -> "DistilledFile":
        """Read the file, also one of the published code; a `UserError`, which `flag` begins, tells of damage."""
        return cls(Path(path), read_pt(path, flag))

    @staticmethod
    def write(
        path: Path, sets: Sequence[SyntheticSet], accs: dict[str, list[float]], real: RealData, about: dict
    ) -> None:
        """Write the sets of all experiments so far, their accuracies in [0, 1] by evaluation model, and the run.

        `about` has plain values that describe the run.
        """
        content: dict = {"data": [[s.images, s.hard_labels] for s in sets], "accs_all_exps": accs}
        if sets and sets[0].images_oe is not None:
            content["data_oe"] = [[s.images_oe, torch.zeros(len(s.images_oe), dtype=torch.int64)] for s in sets]
        if sets and sets[0].labels.is_floating_point():
            content["soft_labels"] = [s.labels for s in sets]
        if any(s.lr_net is not None for s in sets):
            content["lr_net"] = [s.lr_net for s in sets]
        normalisation: dict = {"mean": list(real.mean), "std": list(real.std)}
        if real.zca is not None:
            normalisation["zca"] = {n: getattr(real.zca, n).cpu() for n in ("mean", "matrix", "inverse")}
        content |= {"normalisation": normalisation, "dataset": real.name, "num_classes": real.num_classes}
        content["class_names"] = list(real.class_names)
        if sets and sets[0].factor > 1:
            content["factor"] = sets[0].factor
        save_pt(path, content | {"about": about, "version": VERSION})

    def normalisation(self) -> Normalisation:
        """What the file states of the space of its images; a `UserError` tells that it is damaged."""
        return Normalisation.read(self._content.get("normalisation"), self.path)

    def iterations_left(self, exp_idx: int = 0) -> tuple[int, int] | None:
        """Where an experiment stands whose run was stopped: its iteration, and `--Iteration`.

        None if it is finished, or the file does not say, as those of the published code.
        """
        about = self._content.get("about")
        flags = about.get("flags") if isinstance(about, dict) else None
        done, total = (about.get("iteration"), flags.get("Iteration")) if isinstance(flags, dict) else (None, None)
        known = isinstance(done, int) and isinstance(total, int) and about.get("experiment") == exp_idx
        return (done, total) if known and done < total else None

    def set(self, exp_idx: int = 0, real: RealData | None = None) -> SyntheticSet:
        """The set of one experiment; a `UserError` tells that there is none, or it is damaged or of other data.

        It must match `real`, if that is given: name, image shape, classes and normalisation.
        If the names of classes are the same in another order, the set is brought into that order.
        """
        path, count = self.path, self.num_experiments
        require(0 <= exp_idx < count, f"--exp_idx {exp_idx}: {path} holds {count} experiments, counted from 0")
        images, labels = self._pair("data", exp_idx)
        images_oe, lr_net = None, None
        if "data_oe" in self._content:
            images_oe, _ = self._pair("data_oe", exp_idx)
            require(images_oe.shape[1:] == images.shape[1:], f"{path} is damaged: images and outliers differ in shape")
        if "soft_labels" in self._content:
            labels = self._soft_labels(exp_idx, len(images))
        if self._content.get("lr_net") is not None:
            lr_net = self._entry("lr_net", exp_idx)
            is_rate = isinstance(lr_net, float) and 0 < lr_net < math.inf
            require(is_rate, f"{path} is damaged: its learning rate must be a positive number for each experiment")
        factor = check_factor(self._content.get("factor", 1), tuple(images.shape[2:]), f"{path} is damaged: factor")
        synthetic = SyntheticSet(images, labels, images_oe, lr_net, factor=factor)
        if real is None:
            return synthetic
        self._check_classes(synthetic, real)
        self._check_normalisation(real)
        return in_classes_of(real, synthetic, self.class_names, str(path))

    def start(self, real: RealData, ipc: int, with_outliers: bool, factor: int = 1) -> list[SyntheticSet]:
        """The sets of all experiments, for a distillation to start from.

        A `UserError` tells of a set that does not match `real`, `ipc` and `factor`, or lacks outliers that are needed.
        """
        sets = [self.set(exp_idx, real) for exp_idx in range(max(1, self.num_experiments))]
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
        is_pair = isinstance(entry, (list, tuple)) and len(entry) == 2
        is_pair = is_pair and all(isinstance(t, torch.Tensor) for t in entry)
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

    def _soft_labels(self, exp_idx: int, count: int) -> torch.Tensor:
        """The soft labels of an experiment of `count` images, checked."""
        soft, begin = self._entry("soft_labels", exp_idx), f"{self.path} is damaged: its soft labels"
        is_plain = isinstance(soft, torch.Tensor) and soft.dtype in PLAIN_TENSORS
        fits = is_plain and tuple(soft.shape) == (count, self.num_classes)
        require(fits, f"{begin} must be floating [images, classes] for each experiment")
        require(is_probabilities(soft.float()), f"{begin} are not probabilities")
        return soft.float()

    def _check_classes(self, synthetic: SyntheticSet, real: RealData) -> None:
        """Check the name of the data set, the shape of images and the classes."""
        images, labels, path = synthetic.images, synthetic.labels, self.path
        dataset = self._content.get("dataset", real.name)
        is_soft = labels.is_floating_point()
        classes = labels.shape[1] if is_soft else len(labels.unique())
        shape, wanted = ("x".join(map(str, s)) for s in (images.shape[1:], (real.channel, *real.im_size)))
        is_other_size = dataset == "ImageFolder" and images.shape[-1] != real.im_size[-1]
        require(
            dataset == real.name and shape == wanted and classes == real.num_classes,
            f"--dataset {real.name}: {path} was distilled from {dataset[:40] if isinstance(dataset, str) else '?'} "
            f"({classes} classes, images {shape}), not from {real.num_classes} classes of {wanted}"
            f"{f'. Give --im_size {images.shape[-1]}' if is_other_size else ''}",
        )
        found = f"{int(labels.min())}..{int(labels.max())}"
        told = f"--dataset {real.name}: {path} has the labels {found}; they must be all of 0..{classes - 1}"
        require(is_soft or int(labels.max()) == classes - 1, told)
        class_order(self.class_names, real.class_names, str(path))

    def _check_normalisation(self, real: RealData) -> None:
        """Check that the images were normalised or whitened as those of `real`, if the file says how they were."""
        stored, cure = self._content.get("normalisation"), "the data that it was distilled from (--data_path)"
        is_whitened = isinstance(stored, dict) and "zca" in stored
        how = "with it; give" if is_whitened else "without it; leave out"
        require(is_whitened == (real.zca is not None), f"--zca: {self.path} was made {how} --zca")
        found = _whitening(stored["zca"]) if is_whitened else None
        is_same = not is_whitened or (found and real.zca.to("cpu").is_close(found.mean, found.matrix))
        require(is_same, f"--zca: {self.path} was whitened by another data set: give {cure}")
        is_same = isinstance(stored, dict) and all(is_close(stored.get(n), getattr(real, n)) for n in ("mean", "std"))
        require(
            is_same or "normalisation" not in self._content,
            f"--dataset {real.name}: {self.path} was distilled from other data: the mean and deviation stored in it "
            f"are not those of the data set. Give {cure}",
        )


def is_close(stored: object, known: Sequence[float]) -> bool:
    """Whether stored numbers are the known ones, up to float32 rounding."""
    return _are_floats(stored) and len(stored) == len(known) and np.allclose(stored, known, rtol=1e-5, atol=0)
