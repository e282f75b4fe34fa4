"""Labels of distilled sets as training takes them: classes, or probabilities made of what a file holds."""

import torch

from utils.core.errors import UserError
from utils.core.torch_files import PLAIN_INTEGERS
from utils.data.synthetic import is_probabilities


def training_labels(
    labels: torch.Tensor, kind: str | None, guess: str | None, temperature: float | None, num_classes: int, where: str
) -> tuple[torch.Tensor, str]:
    """Labels for network training, and what they are.

    Args:
        labels: classes `[N]` or `[N, 1]`, or one-hot or soft ones `[N, num_classes]`.
        kind: of soft ones, `probabilities` or `logits`; None: by their values.
        guess: what soft labels are taken for that are no probabilities; None: an error.
        temperature: of the softmax of logits; None: 1.
        where: begins messages: the file.
    Returns:
        int64 `[N]` or probabilities `[N, num_classes]`; `hard`, `probabilities` or `logits`.
    Raises:
        UserError: when they are none of these, or not of `num_classes` classes.
    """
    if labels.ndim == 2 and labels.shape[1] == 1 and num_classes > 1:
        labels = labels[:, 0]
    if labels.ndim == 1:
        if kind is not None or temperature is not None:
            raise UserError(
                f"{where} has one class for each image, no soft labels; leave out --soft_labels and its kin"
            )
        return _classes(labels, num_classes, where), "hard"
    if labels.ndim != 2 or labels.shape[1] != num_classes:
        raise UserError(f"{where} has labels {list(labels.shape[:8])}; --dataset has {num_classes} classes")
    soft = labels.float()
    if not torch.isfinite(soft).all():
        raise UserError(f"{where} has labels that are NaN or infinite; write it again")
    if kind is None and _is_one_hot(soft):
        if temperature is not None:
            raise UserError(f"--label_temperature: {where} has one class for each image, no logits; leave it out")
        return _classes(soft.argmax(1), num_classes, where), "hard"
    kind = kind or _kind(soft, guess, where)
    if kind == "logits":
        return (soft / (temperature or 1.0)).softmax(1), kind
    if temperature is not None:
        raise UserError(f"--label_temperature: {where} has probabilities; only logits have a temperature")
    if not is_probabilities(soft):
        raise UserError(f"{where} has labels that are no probabilities: {_looks(soft)}. Give --soft_labels logits")
    return soft, kind


def _classes(labels: torch.Tensor, num_classes: int, where: str) -> torch.Tensor:
    if labels.dtype not in PLAIN_INTEGERS:
        raise UserError(f"{where} has labels {labels.dtype} [N]; they must be integers, or [N, {num_classes}]")
    found = labels.long().unique().tolist()
    if found != list(range(num_classes)):
        shown = f"{len(found)} classes, {found[0]}..{found[-1]}"
        raise UserError(f"{where} has {shown}; --dataset has {num_classes}, 0..{num_classes - 1}")
    return labels.long()


def _is_one_hot(labels: torch.Tensor) -> bool:
    """Whether every row has one 1 and else only 0."""
    return bool((((labels == 0) | (labels == 1)).all()) and (labels.sum(1) == 1).all())


def _kind(soft: torch.Tensor, guess: str | None, where: str) -> str:
    if is_probabilities(soft):
        return "probabilities"
    if guess is not None and ((soft < 0).any() or (soft > 1).any()):
        return guess
    raise UserError(
        f"{where} has labels that may be probabilities or logits: {_looks(soft)}. Say with --soft_labels which"
    )


def _looks(soft: torch.Tensor) -> str:
    sums = soft.sum(1)
    return f"from {soft.min():.3g} to {soft.max():.3g}, rows that add up to {sums.min():.3g}..{sums.max():.3g}"
