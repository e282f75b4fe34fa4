"""The losses of network training: on labelled images, on outliers, on both."""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.compute.cpu_batches import BatchSplitter


def in_float32(logits: Tensor) -> Tensor:
    """Logits of autocast in float32; on a CPU it would leave the loss of outliers in bfloat16."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """Cross-entropy from the uniform distribution to the softmax of `logits` `[N, num_classes]`, mean over the batch.

    It is `mean_n( logsumexp_k z_nk - mean_k z_nk )`; its minimum, `log(num_classes)`, is reached at constant logits.
    This is the outlier loss of Outlier Exposure (Hendrycks et al., ICLR 2019, section 4).
    """
    return (logits.logsumexp(dim=1) - logits.mean(dim=1)).mean()


def joint_loss(logits: Tensor, labels: Tensor, lambda_oe: float) -> Tensor:
    """Cross-entropy of the labelled rows plus `lambda_oe` times the uniform cross-entropy of the others.

    Of logits `[N + M, num_classes]` the last M (may be none) are of outliers; labels are int64 `[N]` or probabilities.
    """
    n, logits = len(labels), in_float32(logits)
    loss = F.cross_entropy(logits[:n], labels)
    return loss if len(logits) == n else loss + lambda_oe * uniform_cross_entropy(logits[n:])


def joint_parts(images: Tensor, labels: Tensor, splitter: BatchSplitter | None) -> list[tuple[Tensor, Tensor]]:
    """Split a batch into equal parts (images, labels), the mean of whose joint losses is the loss of the batch.

    The images are labelled ones followed by outliers `[N + M, C, H, W]`; each part has its share of both. Without a
    splitter the batch stays whole, as a network with BatchNorm needs it.
    """
    n = len(labels)
    count = 1 if splitter is None else splitter.count(images, n, len(images) - n)
    if count == 1:
        return [(images, labels)]
    parts = map(torch.cat, zip(images[:n].chunk(count), images[n:].chunk(count), strict=True))
    return list(zip(parts, labels.chunk(count), strict=True))
