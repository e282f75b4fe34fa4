"""What data a distilled set or a network was made with, and bringing data or a set into the same form."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from utils.core.errors import named, require
from utils.data.datasets import RealData
from utils.data.whitening import ZCA

NAMED = 10  # classes in a message


def identity(real: RealData) -> dict:
    """Plain values by which later stages know the data; `whitening`: the trace of the matrix of ZCA, or None."""
    return {
        "class_names": list(real.class_names),
        "num_classes": real.num_classes,
        "shape": [real.channel, *real.im_size],
        "mean": list(real.mean),
        "std": list(real.std),
        "whitening": None if real.zca is None else float(real.zca.matrix.trace()),
    }


def class_order(stored: object, known: Sequence[str], what: str) -> list[int] | None:
    """For each class of `stored`, names in the order of labels, its number in `known`; None if nothing has to change.

    A `UserError` tells that the names differ from those of `what`.
    """
    if not isinstance(stored, (list, tuple)) or not stored or not known or list(stored) == list(known):
        return None
    lacks, has = (named([str(n) for n in a if n not in b], NAMED) for a, b in ((stored, known), (known, stored)))
    told = (
        f"--data_path: its classes are not those of {what}: it lacks {lacks or 'none'}, and has {has or 'none'}. Give"
    )
    require(sorted(map(str, stored)) == sorted(known), f"{told} data of the same classes, or rename the folders")
    return [known.index(name) for name in stored]


def renumbered(labels: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Labels in which class `c` has become class `order[c]`; of probabilities `[N, K]` the columns move."""
    numbers = torch.tensor(order, device=labels.device)
    return labels[:, numbers.argsort()] if labels.is_floating_point() else numbers[labels]


def as_trained_on(
    real: RealData, stored: dict, what: str, whitening: Callable[[], ZCA | None]
) -> tuple[RealData, tuple[str, ...]]:
    """Data as networks know them: their order of classes, and the normalisation of the data that they were trained on.

    `stored` is the `identity` of that data, and `what` the networks, for messages; `whitening` finds that of the
    training, if it is stored somewhere. Lines for the log say what was changed.
    """
    lines = []
    order = class_order(stored.get("class_names"), real.class_names, what)
    shape, classes = [real.channel, *real.im_size], real.num_classes
    wanted, classes_wanted = stored.get("shape") or shape, stored.get("num_classes") or classes
    resize = f"give --im_size {wanted[1]}" if real.name == "ImageFolder" else "give the data that they were trained on"
    require(
        (wanted, classes_wanted) == (shape, classes),
        f"--data_path: {classes} classes of {'x'.join(map(str, shape))} images do not fit {what}, which were trained "
        f"on {classes_wanted} classes of {'x'.join(map(str, wanted))}; {resize}",
    )
    if order is not None:
        back = sorted(range(classes), key=order.__getitem__)
        labels = {name: renumbered(getattr(real, name), back) for name in ("labels_train", "labels_test")}
        real = replace(real, **labels, class_names=tuple(stored["class_names"]))
        lines.append(f"classes in the order of {what}: {named(real.class_names, NAMED)}")
    mean, std = (tuple(stored.get(name) or getattr(real, name)) for name in ("mean", "std"))
    if real.zca is None:
        if not all(map(math.isclose, (*mean, *std), (*real.mean, *real.std))):
            lines.append(f"images are normalised as in the training of {what}, not by the statistics of --data_path")
        return replace(real, mean=mean, std=std), tuple(lines)
    trace = stored.get("whitening")
    if trace is not None and not _has_trace(real.zca, trace):
        zca = whitening()
        told = f"--zca: --data_path gives another whitening than {what} were trained with; give their data"
        require(zca is not None and _has_trace(zca, trace), told)
        real = replace(real, zca=zca.to(real.device))
        lines.append(f"images are whitened as in the training of {what}, not by the statistics of --data_path")
    return real, tuple(lines)


def _has_trace(zca: ZCA, trace: float) -> bool:
    return math.isclose(trace, float(zca.matrix.trace()), rel_tol=1e-4)
