"""Labels of distilled sets as training takes them: classes, or probabilities made of what a file holds."""

import torch

from utils.core.errors import UserError, require
from utils.core.torch_files import PLAIN_INTEGERS
from utils.data.synthetic import is_probabilities


def training_labels(
    labels: torch.Tensor, kind: str | None, guess: str | None, temperature: float | None, num_classes: int, where: str
) -> tuple[torch.Tensor, str]:
    """Labels for network training, and what they are.

    A `UserError`, which the file `where` begins, tells that they are none of these, or not of `num_classes` classes.

    Args:
        labels: classes `[N]` or `[N, 1]`, or one-hot or soft ones `[N, num_classes]`.
        kind: of soft ones, `probabilities` or `logits`; None: by their values.
        guess: what soft labels are taken for that are no probabilities; None: an error.
        temperature: of the softmax of logits; None: 1.
    Returns:
        int64 `[N]` or probabilities `[N, num_classes]`; `hard`, `probabilities` or `logits`.
    """
    if labels.ndim == 2 and labels.shape[1] == 1 and num_classes > 1:
        labels = labels[:, 0]
    if labels.ndim == 1:
        told = f"{where} has one class for each image, no soft labels; leave out --soft_labels and its kin"
        require(kind is None and temperature is None, told)
        return _classes(labels, num_classes, where), "hard"
    told = f"{where} has labels {list(labels.shape[:8])}; --dataset has {num_classes} classes"
    require(labels.ndim == 2 and labels.shape[1] == num_classes, told)
    soft = labels.float()
    require(torch.isfinite(soft).all(), f"{where} has labels that are NaN or infinite; write it again")
    sums, probable = soft.sum(1), is_probabilities(soft)
    if kind is None and probable and ((soft == 0) | (soft == 1)).all():
        told = f"--label_temperature: {where} has one class for each image, no logits; leave it out"
        require(temperature is None, told)
        return _classes(soft.argmax(1), num_classes, where), "hard"
    looks = f"from {soft.min():.3g} to {soft.max():.3g}, rows that add up to {sums.min():.3g}..{sums.max():.3g}"
    kind = kind or ("probabilities" if probable else guess if (soft < 0).any() or (soft > 1).any() else None)
    if kind is None:
        raise UserError(
            f"{where} has labels that may be probabilities or logits: {looks}. Say with --soft_labels which"
        )
    if kind == "logits":
        return (soft / (temperature or 1.0)).softmax(1), kind
    require(temperature is None, f"--label_temperature: {where} has probabilities; only logits have a temperature")
    require(probable, f"{where} has labels that are no probabilities: {looks}. Give --soft_labels logits")
    return soft, kind


def _classes(labels: torch.Tensor, num_classes: int, where: str) -> torch.Tensor:
    told = f"{where} has labels {labels.dtype} [N]; they must be integers, or [N, {num_classes}]"
    require(labels.dtype in PLAIN_INTEGERS, told)
    found = labels.long().unique().tolist()
    told = (
        f"{where} has {len(found)} classes, {found[0]}..{found[-1]}; --dataset has {num_classes}, 0..{num_classes - 1}"
    )
    require(found == list(range(num_classes)), told)
    return labels.long()
