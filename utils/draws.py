"""What is random in an iteration of gradient matching: drawn at once on the host, and sent to the device together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import distributed
from .augment import DSA, Transform
from .datasets import RealData
from .outliers import OutlierBatch, OutlierPool, PseudoOutliers
from .rng import Draw, generator, send_draws, tensors_of
from .synthetic import SyntheticSet
from .training import Batch, Trainer

BATCHNORM_IMAGES = 16
DRAWN_NUMBERS = 2**25  # that are drawn and sent together: a quarter of a gigabyte of indices


@dataclass(frozen=True)
class SlotDraw(Draw):
    """What is random in the matching of one slot: which real images (or outliers) it takes, and the augmentation that
    they share with the synthetic ones."""

    real: torch.Tensor | OutlierBatch
    transform: Transform | None


@dataclass(frozen=True)
class StepDraw(Draw):
    """What is random in one outer step: by slot, for the images and for the outliers; the images that set BatchNorm's
    statistics (int64 `[n]`); the epochs of network training that follow."""

    images: dict[int, SlotDraw]
    outliers: dict[int, SlotDraw]
    batchnorm: torch.Tensor | None
    epochs: list[list[Batch]]


class IterationDraws:
    """Draws for the iterations of gradient matching, each from a generator of its own key.

    Args:
        dsa: the Siamese augmentation of the matching.
        batches: how many real images, and how many outliers, a slot takes.
        loops: outer loop and inner loop.
        trainer: trains the network between the steps.
    """

    def __init__(
        self,
        real: RealData,
        outliers: OutlierPool | PseudoOutliers | None,
        dsa: DSA | None,
        seed: int,
        batches: tuple[int, int],
        loops: tuple[int, int],
        trainer: Trainer,
    ):
        self.real, self.outliers, self.dsa, self.seed, self.trainer = real, outliers, dsa, seed, trainer
        self.batch_real, self.batch_oe = batches
        self.outer_loop, self.inner_loop = loops
        self.has_batchnorm = any(isinstance(m, nn.BatchNorm2d) for m in trainer.net.modules())
        self.ahead: tuple[tuple[int, int], list[StepDraw]] | None = None

    def choose(self, slot: int, n: int, g: torch.Generator) -> torch.Tensor:
        """Indices of `n` different training images of a class, or of all if there are fewer."""
        indices = self.real.class_indices[slot]
        return indices[torch.randperm(len(indices), generator=g)[:n]]

    def generator(self, exp: int, *key: int | str) -> torch.Generator:
        """The generator of a draw in experiment `exp`."""
        return generator(self.seed, "match", exp, *key)

    def steps(self, exp: int, it: int, synthetic: SyntheticSet) -> Iterator[StepDraw]:
        """The draws of every outer step of an iteration, on the device of the data.

        They are drawn and sent together, in as few parts as `DRAWN_NUMBERS` allows. `synthetic` is what the network
        will be trained on; only its sizes matter.
        """
        outer = 0
        while outer < self.outer_loop:
            if not outer and self.ahead is not None and self.ahead[0] == (exp, it):
                part = self.ahead[1]
            else:
                part = self._part(exp, it, outer, synthetic)
            self.ahead = None
            yield from part
            outer += len(part)

    def look_ahead(self, exp: int, it: int, synthetic: SyntheticSet) -> None:
        """Draw for an iteration to come: on a GPU, while the device is still at work on the one before."""
        self.ahead = ((exp, it), self._part(exp, it, 0, synthetic))

    def _part(self, exp: int, it: int, first: int, synthetic: SyntheticSet) -> list[StepDraw]:
        """The draws of the outer steps from `first` on, as many as are drawn together."""
        part = [self._step(exp, it, first, synthetic)]
        size = sum(t.numel() for t in tensors_of(part))
        last = min(self.outer_loop, first + max(1, DRAWN_NUMBERS // max(1, size)))
        part += [self._step(exp, it, outer, synthetic) for outer in range(first + 1, last)]
        return send_draws(part, self.real.device)

    def _step(self, exp: int, it: int, outer: int, synthetic: SyntheticSet) -> StepDraw:
        slots = distributed.mine(self.real.num_classes)
        return StepDraw(
            {slot: self._images(exp, it, outer, slot) for slot in slots},
            {slot: self._outliers(exp, it, outer, slot) for slot in slots if self.outliers is not None},
            self._batchnorm(exp, it, outer) if self.has_batchnorm else None,
            self._epochs(exp, it, outer, synthetic),
        )

    def _images(self, exp: int, it: int, outer: int, slot: int) -> SlotDraw:
        index = self.choose(slot, self.batch_real, self.generator(exp, "real", it, outer, slot))
        return SlotDraw(index, self._siamese(exp, "siamese", it, outer, slot))

    def _outliers(self, exp: int, it: int, outer: int, slot: int) -> SlotDraw:
        batch = self.outliers.choose(slot, self.batch_oe, self.generator(exp, "real oe", it, outer, slot))
        return SlotDraw(batch, self._siamese(exp, "siamese oe", it, outer, slot))

    def _siamese(self, *key: int | str) -> Transform | None:
        return None if self.dsa is None else self.dsa.draw(1, self.real.im_size, self.generator(*key))

    def _batchnorm(self, exp: int, it: int, outer: int) -> torch.Tensor:
        """16 images of each class."""
        slots = range(self.real.num_classes)
        key = ("batchnorm", it, outer)
        return torch.cat([self.choose(c, BATCHNORM_IMAGES, self.generator(exp, *key, c)) for c in slots])

    def _epochs(self, exp: int, it: int, outer: int, synthetic: SyntheticSet) -> Sequence[list[Batch]]:
        """The epochs behind this step; none behind the last. Rank 0 trains for all processes."""
        if outer == self.outer_loop - 1 or distributed.rank():
            return []
        g = self.generator(exp, "inner", it, outer)
        return self.trainer.draw_epochs(synthetic, [g] * self.inner_loop)
