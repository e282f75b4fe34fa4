"""What data a distilled set or a network was made with, and bringing data or a set into the same form."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from utils.core.errors import UserError, named
from utils.data.datasets import RealData
from utils.data.whitening import ZCA

NAMED = 10  # classes in a message


def identity(real: RealData) -> dict:
    """Plain values by which later stages know the data: classes in order, shape, and normalisation.

    `whitening`: the trace of the matrix of ZCA, or None.
    """
    return {
        "class_names": list(real.class_names),
        "num_classes": real.num_classes,
        "shape": [real.channel, *real.im_size],
        "mean": list(real.mean),
        "std": list(real.std),
        "whitening": None if real.zca is None else float(real.zca.matrix.trace()),
    }


def class_order(stored: object, known: Sequence[str], what: str) -> list[int] | None:
    """For each class of `stored`, names in the order of labels, its number in `known`.

    None where the names of one side are not known, or both have the same order.

    Args:
        what: what the stored names are of, for the message.
    Raises:
        UserError: when the names differ.
    """
    if not isinstance(stored, (list, tuple)) or not stored or not known or list(stored) == list(known):
        return None
    if sorted(map(str, stored)) != sorted(known):
        parts = ([str(n) for n in a if n not in b] for a, b in ((stored, known), (known, stored)))
        lacks, has = (named(part, NAMED) or "none" for part in parts)
        raise UserError(
            f"--data_path: its classes are not those of {what}: it lacks {lacks}, and has {has}. Give data of the same "
            "classes, or rename the folders"
        )
    return [known.index(name) for name in stored]


def renumbered(labels: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Labels in which class `c` has become class `order[c]`; of probabilities `[N, K]` the columns move."""
    numbers = torch.tensor(order, device=labels.device)
    if not labels.is_floating_point():
        return numbers[labels]
    moved = torch.empty_like(labels)
    moved[:, numbers] = labels
    return moved


def as_trained_on(
    real: RealData, stored: dict, what: str, whitening: Callable[[], ZCA | None]
) -> tuple[RealData, tuple[str, ...]]:
    """Data as networks know them: their order of classes, and the normalisation of the data that they were trained on.

    Args:
        stored: the `identity` of that data; what: the networks, for messages.
        whitening: finds that of the training, if it is stored somewhere.
    Returns:
        The data, and lines for the log that say what was changed.
    Raises:
        UserError: when the classes or the size of the images differ, or the whitening differs and is not at hand.
    """
    lines = []
    order = class_order(stored.get("class_names"), real.class_names, what)
    shape, classes = [real.channel, *real.im_size], real.num_classes
    if stored.get("shape", shape) != shape or stored.get("num_classes", classes) != classes:
        raise UserError(_other_shape(stored, real, what))
    if order is not None:
        back = sorted(range(classes), key=order.__getitem__)
        labels = {name: renumbered(getattr(real, name), back) for name in ("labels_train", "labels_test")}
        real = replace(real, **labels, class_names=tuple(stored["class_names"]))
        lines.append(f"classes in the order of {what}: {named(real.class_names, NAMED)}")
    if real.zca is not None:
        real, changed = _whitened_as(real, stored.get("whitening"), what, whitening)
        return real, (*lines, *changed)
    mean, std = (tuple(stored.get(name) or getattr(real, name)) for name in ("mean", "std"))
    if not all(map(math.isclose, (*mean, *std), (*real.mean, *real.std))):
        lines.append(f"images are normalised as in the training of {what}, not by the statistics of --data_path")
    return replace(real, mean=mean, std=std), tuple(lines)


def _other_shape(stored: dict, real: RealData, what: str) -> str:
    """The message for data of another shape or number of classes."""
    shape, classes = stored.get("shape"), stored.get("num_classes")
    wanted, found = ("x".join(map(str, s)) for s in (shape, (real.channel, *real.im_size)))
    cure = f"give --im_size {shape[1]}" if real.name == "ImageFolder" else "give the data that they were trained on"
    return (
        f"--data_path: {real.num_classes} classes of {found} images do not fit {what}, which were trained on {classes} "
        f"classes of {wanted}; {cure}"
    )


def _whitened_as(
    real: RealData, trace: float | None, what: str, whitening: Callable[[], ZCA | None]
) -> tuple[RealData, tuple[str, ...]]:
    """Data whitened as in training; `trace`: of the matrix then."""
    if trace is None or math.isclose(trace, float(real.zca.matrix.trace()), rel_tol=1e-4):
        return real, ()
    zca = whitening()
    if zca is None or not math.isclose(trace, float(zca.matrix.trace()), rel_tol=1e-4):
        raise UserError(f"--zca: --data_path gives another whitening than {what} were trained with; give their data")
    line = f"images are whitened as in the training of {what}, not by the statistics of --data_path"
    return replace(real, zca=zca.to(real.device)), (line,)
