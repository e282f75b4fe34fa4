"""The synthetic set: labelled images and outliers that networks are trained on, and its files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from utils.compute.version import VERSION
from utils.core.errors import UserError
from utils.core.files import save_pt
from utils.core.torch_files import PLAIN_INTEGERS, PLAIN_TENSORS, read_pt
from utils.data.datasets import RealData
from utils.data.identity import class_order, renumbered


class OutlierMaker(Protocol):
    """Makes outliers whenever an epoch asks for them; `utils/outliers/sources.py` has one."""

    @property
    def count(self) -> int:
        """How many are made together."""

    def make(self, generator: torch.Generator) -> torch.Tensor:
        """New outliers, normalised `[count, C, H, W]`, sorted by class slot."""


@dataclass(frozen=True)
class SyntheticSet:
    """Labelled images to train networks on, usually distilled and sorted by class, and outliers if there are any.

    `images`, `images_oe`: float32 `[num_classes·ipc, C, H, W]`, normalised; `labels`: int64 `[num_classes·ipc]`, or
    probabilities, float32 `[num_classes·ipc, num_classes]`; `lr_net`: the distilled learning rate for network training,
    or None; `fresh_oe`: draws new outliers in every epoch, instead of `images_oe`.
    """

    images: torch.Tensor
    labels: torch.Tensor
    images_oe: torch.Tensor | None = None
    lr_net: float | None = None
    fresh_oe: OutlierMaker | None = None

    @property
    def hard_labels(self) -> torch.Tensor:
        """The class of each image, int64 `[N]`: of soft labels the most probable."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    @property
    def num_outliers(self) -> int:
        """How many outliers an epoch has."""
        if self.fresh_oe is not None:
            return self.fresh_oe.count
        return 0 if self.images_oe is None else len(self.images_oe)

    def to(self, device: torch.device | str) -> "SyntheticSet":
        """The same set on `device`."""
        oe = None if self.images_oe is None else self.images_oe.to(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), images_oe=oe)

    def detached_copy(self) -> "SyntheticSet":
        """A copy that later updates do not change."""
        oe = None if self.images_oe is None else self.images_oe.detach().clone()
        return replace(self, images=self.images.detach().clone(), images_oe=oe)

    def detached_cpu(self) -> "SyntheticSet":
        """A copy on the CPU that later updates do not change."""
        return self.detached_copy().to("cpu")

    def without_outliers(self) -> "SyntheticSet":
        """The labelled images alone."""
        return replace(self, images_oe=None, fresh_oe=None)


def result_name(method: str, dataset: str, model: str, ipc: int) -> str:
    """The file name of a distilled set."""
    return f"res_{method}_{dataset}_{model}_{ipc}ipc.pt"


def save_synthetic(
    path: Path, sets: Sequence[SyntheticSet], accs: dict[str, list[float]], real: RealData, about: dict
) -> None:
    """Write the distilled sets of all experiments so far, in the layout of the published code.

    The file is a dict: `data`, a list of `[images, labels]` per experiment, and with outliers `data_oe`, a list of
    `[outliers, zeros]` (CPU, float32, normalised; int64); `accs_all_exps`: lists of accuracies by evaluation model. Not
    in published files: `normalisation` (`mean`, `std`; with `--zca` also `zca`), `lr_net` (MTT: the learning rate of
    each experiment), `soft_labels` (probabilities `[N, num_classes]` of each experiment, where `labels` has the most
    probable class), `dataset`, `num_classes`, `class_names`,
    `about`, `version`.

    Args:
        accs: accuracies in [0, 1] by evaluation model; about: plain values that describe the run.
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
    save_pt(path, content | {"about": about, "version": VERSION})


def load_synthetic(
    path: str | Path, exp_idx: int = 0, real: RealData | None = None, what: str = "distilled set"
) -> SyntheticSet:
    """Read one experiment of a distilled set; files of the published code can be read, too.

    Args:
        path: a `res_….pt` file.
        exp_idx: which experiment.
        real: the data set that it must match, if given: name, image shape, classes and normalisation. If the names of
            classes are the same in another order, the set is brought into that order.
        what: the name of the file in messages, e.g. its flag.
    Raises:
        UserError: when the file is damaged, not a distilled set, from other data, or has no such experiment.
    """
    path = Path(path)
    content = read_pt(path, what)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise UserError(f"{path} is no distilled set: it has no list 'data'. Give the res_….pt file of stage 1")
    if not 0 <= exp_idx < len(content["data"]):
        raise UserError(f"--exp_idx {exp_idx}: {path} holds {len(content['data'])} experiments, counted from 0")
    images, labels = _pair(content["data"], exp_idx, path)
    images_oe = None
    if "data_oe" in content:
        if not isinstance(content["data_oe"], list) or exp_idx >= len(content["data_oe"]):
            raise UserError(f"{path} is no distilled set: its 'data_oe' has no experiment {exp_idx}")
        images_oe, _ = _pair(content["data_oe"], exp_idx, path)
        if images_oe.shape[1:] != images.shape[1:]:
            raise UserError(f"{path} is damaged: images and outliers differ in shape")
    if "soft_labels" in content:
        labels = _soft_labels(content, exp_idx, path)
    synthetic = SyntheticSet(images, labels, images_oe, _stored_lr(content, exp_idx, path))
    if real is None:
        return synthetic
    _check_fits(images, labels, real, path, content)
    return in_classes_of(real, synthetic, content.get("class_names"), str(path))


def in_classes_of(real: RealData, synthetic: SyntheticSet, class_names: object, what: str) -> SyntheticSet:
    """The set with the labels of `real`, sorted by class, if its own classes had another order.

    Args:
        class_names: those of the set in the order of its labels; what: the file, for messages.
    Raises:
        UserError: when the names of the classes differ.
    """
    order = class_order(class_names, real.class_names, what)
    if order is None:
        return synthetic
    moved = replace(synthetic, labels=renumbered(synthetic.labels, order))
    by_class = moved.hard_labels.argsort(stable=True)
    return replace(moved, images=moved.images[by_class], labels=moved.labels[by_class])


def iterations_left(path: str | Path, exp_idx: int = 0) -> tuple[int, int] | None:
    """Where an experiment of a `res_….pt` stands whose run was stopped: its iteration, and `--Iteration`.

    None if it is finished, or the file does not say, as those of the published code.
    """
    content = read_pt(Path(path), "distilled set")
    about = content.get("about") if isinstance(content, dict) else None
    flags = about.get("flags") if isinstance(about, dict) else None
    done, total = (about.get("iteration"), flags.get("Iteration")) if isinstance(flags, dict) else (None, None)
    if not isinstance(done, int) or not isinstance(total, int) or about.get("experiment") != exp_idx or done >= total:
        return None
    return done, total


def _soft_labels(content: dict, exp_idx: int, path: Path) -> torch.Tensor:
    """The soft labels of an experiment, checked."""
    stored, num_classes = content["soft_labels"], content.get("num_classes")
    soft = stored[exp_idx] if isinstance(stored, list) and exp_idx < len(stored) else None
    shape = (len(content["data"][exp_idx][0]), num_classes)
    if not isinstance(soft, torch.Tensor) or soft.dtype not in PLAIN_TENSORS or tuple(soft.shape) != shape:
        raise UserError(f"{path} is damaged: its soft labels must be floating [images, classes] for each experiment")
    if not is_probabilities(soft.float()):
        raise UserError(f"{path} is damaged: its soft labels are not probabilities")
    return soft.float()


def is_probabilities(labels: torch.Tensor) -> bool:
    """Whether every row of `labels` `[N, K]` has numbers from 0 that add up to 1 (to 0.001)."""
    return bool(torch.isfinite(labels).all() and (labels >= 0).all() and ((labels.sum(1) - 1).abs() < 1e-3).all())


def _stored_lr(content: dict, exp_idx: int, path: Path) -> float | None:
    """The learning rate stored for an experiment, or None."""
    stored = content.get("lr_net")
    if stored is None:
        return None
    value = stored[exp_idx] if isinstance(stored, list) and exp_idx < len(stored) else 0
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise UserError(f"{path} is damaged: its learning rate must be a positive number for each experiment")
    return value


def _pair(entries: list, index: int, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one experiment, checked."""
    entry = entries[index]
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not all(isinstance(t, torch.Tensor) for t in entry):
        raise UserError(f"{path} is no distilled set: experiment {index} is not a pair of images and labels")
    images, labels = (t.detach() for t in entry)
    kinds = images.dtype in PLAIN_TENSORS and labels.dtype in PLAIN_INTEGERS
    if not kinds or images.ndim != 4 or labels.shape != images.shape[:1] or not images.numel():
        raise UserError(
            f"{path} is no distilled set: images {list(images.shape[:8])} {images.dtype}, labels "
            f"{list(labels.shape[:8])} {labels.dtype}; they must be floating [N, C, H, W] and integers [N]"
        )
    images, labels = images.float(), labels.long()
    if not torch.isfinite(images).all() or labels.min() < 0:
        raise UserError(f"{path} is damaged: images must be finite and labels whole numbers from 0")
    return images, labels


def _check_fits(images: torch.Tensor, labels: torch.Tensor, real: RealData, path: Path, content: dict) -> None:
    """Check that a set was distilled from `real`: same name, image shape, classes and normalisation."""
    dataset = content.get("dataset", real.name)
    soft = labels.is_floating_point()
    classes = labels.shape[1] if soft else len(labels.unique())
    shape = (real.channel, *real.im_size)
    if dataset != real.name or tuple(images.shape[1:]) != shape or classes != real.num_classes:
        size = images.shape[-1]
        cure = f". Give --im_size {size}" if dataset == "ImageFolder" and size != shape[-1] else ""
        raise UserError(
            f"--dataset {real.name}: {path} was distilled from {str(dataset)[:40] if isinstance(dataset, str) else '?'}"
            f" ({classes} classes, images {'x'.join(map(str, images.shape[1:]))}), not from {real.num_classes} "
            f"classes of {'x'.join(map(str, shape))}{cure}"
        )
    if not soft and int(labels.max()) != classes - 1:
        raise UserError(
            f"--dataset {real.name}: {path} has the labels {int(labels.min())}..{int(labels.max())}; they must be all "
            f"of 0..{classes - 1}"
        )
    class_order(content.get("class_names"), real.class_names, str(path))
    stored = content.get("normalisation")
    whitened = isinstance(stored, dict) and "zca" in stored
    if whitened != (real.zca is not None):
        made = "with" if whitened else "without"
        raise UserError(f"--zca: {path} was made {made} it; {'give' if made == 'with' else 'leave out'} --zca")
    if whitened and not _whitened_alike(stored["zca"], real):
        raise UserError(
            f"--zca: {path} was whitened by another data set: give the data that it was distilled from (--data_path)"
        )
    if "normalisation" in content and not _same_normalisation(content["normalisation"], real):
        raise UserError(
            f"--dataset {real.name}: {path} was distilled from other data: the mean and deviation stored in it are not "
            "those of the data set. Give the data that it was distilled from (--data_path)"
        )


def _whitened_alike(stored: object, real: RealData) -> bool:
    """Whether the stored whitening is that of `real`."""
    parts = [stored.get(name) for name in ("mean", "matrix")] if isinstance(stored, dict) else [None]
    return all(isinstance(p, torch.Tensor) for p in parts) and real.zca.to("cpu").is_close(*(p.float() for p in parts))


def _same_normalisation(stored: object, real: RealData) -> bool:
    """Whether the stored mean and deviation are those of `real`, up to float32 rounding."""
    if not isinstance(stored, dict):
        return False
    if ("zca" in stored) != (real.zca is not None):
        return False
    pairs = ((stored.get("mean"), real.mean), (stored.get("std"), real.std))
    return all(
        isinstance(have, (list, tuple))
        and len(have) == len(want)
        and all(isinstance(a, float) and math.isclose(a, b, rel_tol=1e-5) for a, b in zip(have, want, strict=True))
        for have, want in pairs
    )


def load_start(path: str | None, real: RealData, ipc: int, with_outliers: bool) -> list[SyntheticSet]:
    """All experiments of the distilled set from which a distillation starts; an empty list without a path.

    Raises:
        UserError: when the set does not match `real` and `ipc`, or lacks the outliers that are needed.
    """
    if path is None:
        return []
    sets = [load_synthetic(path, 0, real, "--load_path")]
    more = range(1, len(read_pt(Path(path), "--load_path")["data"]))
    sets += [load_synthetic(path, i, real, "--load_path") for i in more]
    for one in sets:
        order = torch.arange(real.num_classes).repeat_interleave(ipc)
        if not torch.equal(one.labels, order):
            raise UserError(f"--load_path: {path} does not have {ipc} images of each class, in order; give its --ipc")
        if with_outliers and (one.images_oe is None or one.images_oe.shape != one.images.shape):
            raise UserError(
                f"--load_path: {path} has no outliers to start from; give a set of main_oe.py or main_poe.py"
            )
    return sets
