"""What is random in network training and in an iteration of gradient matching: drawn on the host, sent together."""

from dataclasses import dataclass

import torch

from utils.compute.transfer import Draw
from utils.data.augment import DC, DSA
from utils.data.synthetic import SyntheticSet


@dataclass(frozen=True)
class Batch(Draw):
    """What is random in one batch: the images and the outliers that it takes, and how they are augmented."""

    index: torch.Tensor
    transform: Draw | None
    index_oe: torch.Tensor | None
    transform_oe: Draw | None

    @property
    def count(self) -> int:
        """How many images and outliers."""
        return len(self.index) + (0 if self.index_oe is None else len(self.index_oe))


def draw_epoch(synthetic: SyntheticSet, batch: int, augmentation: DSA | DC | None, g: torch.Generator) -> list[Batch]:
    """What is random in one pass over a synthetic set in batches of `batch`; of the set only the sizes matter."""

    def transform(index: torch.Tensor | None) -> Draw | None:
        """How the images of `index` are augmented."""
        if augmentation is None or index is None or not len(index):
            return None
        return augmentation.draw(len(index), tuple(synthetic.images.shape[2:]), g)

    order = torch.randperm(len(synthetic.images), generator=g)
    outliers = synthetic.images_oe
    order_oe = None if outliers is None else torch.randperm(len(outliers), generator=g)
    batches = []
    for start in range(0, len(order), batch):
        index = order[start : start + batch]
        index_oe = None if order_oe is None else order_oe[start : start + batch]
        batches.append(Batch(index, transform(index), index_oe, transform(index_oe)))
    return batches
