"""The random choices of an iteration of gradient or distribution matching: drawn on the CPU, sent together.

The Siamese rule: a `SlotDraw` has one `transform`, which is applied to both the real and the synthetic batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from utils.compute import distributed
from utils.compute.transfer import Draw, send_draws, tensors_of
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import DSA, Transform
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.methods import Flag, MethodInputs
from utils.outliers.sources import OutlierBatch, OutlierSource
from utils.outliers.start import OutlierRecipe
from utils.settings.parser import count, number
from utils.training.draws import Batch, draw_epoch
from utils.training.network_pool import PoolSettings

BATCHNORM_IMAGES = 16  # of each class
DRAWN_NUMBERS = 2**25  # drawn and sent together: a quarter of a gigabyte of indices


@dataclass(frozen=True)
class MatchSettings:
    """The settings of gradient and distribution matching; each is described at the flag of its name."""

    model: str
    ipc: int
    seed: int = 1
    lr_img: float = 0.1
    lr_img_oe: float | None = None
    lr_net: float = 0.01
    batch_real: int = 256
    batch_oe: int = 256
    batch_train: int = 256
    lambda_oe: float = 0.5
    metric: str = "ours"
    init: str = "noise"
    outer_loop: int = 1
    inner_loop: int = 1
    dsa: DSA | None = None
    pool: PoolSettings | None = None
    recipe: OutlierRecipe = field(default_factory=OutlierRecipe)
    moments_oe: int = 1
    joint: bool = False
    spread_oe: float = 0.0


POOL_FLAGS = (
    Flag(
        "network_pool",
        count(0),
        0,
        "match on so many networks in turn, which train on the synthetic set; 0: on a fresh random network in every "
        "iteration, as published",
    ),
    Flag("pool_epochs", count(1), None, "epochs that a network of the pool trains before its turn; left out: 20"),
    Flag("pool_last_epoch", count(1), None, "epochs after which a network of the pool is replaced; left out: 200"),
)


SPREAD = Flag(
    "spread_oe",
    number(0),
    0.0,
    "weight of a term that keeps outliers apart in the features of the network; 0: without, as published",
)


def refuse_without_outliers(inputs: MethodInputs, **unused: Any) -> None:
    """Raise `UserError` for a flag of outliers, by name, that differs from the value it has as published."""
    for name, published in unused.items():
        if inputs.outliers is None and inputs.flags[name] not in (None, published):
            raise UserError(
                f"--{name} {inputs.flags[name]}: main.py distils no outliers; leave it out, or use main_oe.py or "
                "main_poe.py"
            )


def pool_settings(inputs: MethodInputs) -> PoolSettings | None:
    """The pool of the flags, or None; raises `UserError` for flags of a pool that there is not."""
    f = inputs.flags
    given = {"epochs": f["pool_epochs"], "last_epoch": f["pool_last_epoch"]}
    given = {name: value for name, value in given.items() if value is not None}
    if f["network_pool"]:
        return PoolSettings(f["network_pool"], **given)
    if given:
        raise UserError(f"--pool_{next(iter(given))}: --network_pool 0 has no networks to train; give their number")
    return None


@dataclass(frozen=True)
class SlotDraw(Draw):
    """The random choices for one slot.

    `real`: its real images (int64 `[n]`) or outliers; `transform`: the augmentation of both these and the synthetic
    ones.
    """

    real: torch.Tensor | OutlierBatch
    transform: Transform | None


@dataclass(frozen=True)
class StepDraw(Draw):
    """The random choices of one outer step.

    `images`, `outliers`: by slot; `batchnorm`: the training images (int64 `[n]`) that set BatchNorm's statistics;
    `epochs`: the network training that follows.
    """

    images: dict[int, SlotDraw]
    outliers: dict[int, SlotDraw]
    batchnorm: torch.Tensor | None
    epochs: list[list[Batch]]


class IterationDraws:
    """Makes the draws of the iterations, each from a generator with its own key.

    `has_batchnorm`: whether to draw images for BatchNorm's statistics. `all_slots`: whether every process draws for all
    slots, not only for its own.
    """

    def __init__(
        self,
        real: RealData,
        outliers: OutlierSource | None,
        settings: MatchSettings,
        has_batchnorm: bool,
        all_slots: bool = False,
    ):
        self.all_slots = all_slots
        self.real, self.outliers, self.settings, self.has_batchnorm = real, outliers, settings, has_batchnorm
        self.ahead: tuple[tuple[int, int], list[StepDraw]] | None = None

    def generator(self, exp: int, *key: int | str) -> torch.Generator:
        """The generator of a draw in experiment `exp`."""
        return generator(self.settings.seed, "match", exp, *key)

    def steps(self, exp: int, it: int, synthetic: SyntheticSet) -> Iterator[StepDraw]:
        """The draws of every outer step of an iteration, on the device of the data.

        They are drawn and sent together, in as few parts as `DRAWN_NUMBERS` allows. Only the sizes of `synthetic`, on
        which the network will be trained, matter.
        """
        outer = 0
        while outer < self.settings.outer_loop:
            if not outer and self.ahead is not None and self.ahead[0] == (exp, it):
                part = self.ahead[1]
            else:
                part = self._part(exp, it, outer, synthetic)
            self.ahead = None
            yield from part
            outer += len(part)

    def look_ahead(self, exp: int, it: int, synthetic: SyntheticSet) -> None:
        """Draw for a later iteration; a GPU meanwhile computes the current one."""
        self.ahead = ((exp, it), self._part(exp, it, 0, synthetic))

    def _part(self, exp: int, it: int, first: int, synthetic: SyntheticSet) -> list[StepDraw]:
        """The draws of as many outer steps, from `first` on, as are drawn together."""
        part = [self._step(exp, it, first, synthetic)]
        size = sum(t.numel() for t in tensors_of(part))
        last = min(self.settings.outer_loop, first + max(1, DRAWN_NUMBERS // max(1, size)))
        part += [self._step(exp, it, outer, synthetic) for outer in range(first + 1, last)]
        return send_draws(part, self.real.device)

    def _step(self, exp: int, it: int, outer: int, synthetic: SyntheticSet) -> StepDraw:
        slots = range(self.real.num_classes) if self.all_slots else distributed.own_share(self.real.num_classes)
        return StepDraw(
            {slot: self._images(exp, it, outer, slot) for slot in slots},
            {slot: self._outliers(exp, it, outer, slot) for slot in slots if self.outliers is not None},
            self._batchnorm(exp, it, outer) if self.has_batchnorm else None,
            self._epochs(exp, it, outer, synthetic),
        )

    def _images(self, exp: int, it: int, outer: int, slot: int) -> SlotDraw:
        index = self.real.choose(slot, self.settings.batch_real, self.generator(exp, "real", it, outer, slot))
        return SlotDraw(index, self._siamese(exp, "siamese", it, outer, slot))

    def _outliers(self, exp: int, it: int, outer: int, slot: int) -> SlotDraw:
        batch = self.outliers.choose(slot, self.settings.batch_oe, self.generator(exp, "real oe", it, outer, slot))
        return SlotDraw(batch, self._siamese(exp, "siamese oe", it, outer, slot))

    def _siamese(self, *key: int | str) -> Transform | None:
        dsa = self.settings.dsa
        return None if dsa is None else dsa.draw(1, self.real.im_size, self.generator(*key))

    def _batchnorm(self, exp: int, it: int, outer: int) -> torch.Tensor:
        """16 images of each class."""
        slots = range(self.real.num_classes)
        key = ("batchnorm", it, outer)
        return torch.cat([self.real.choose(c, BATCHNORM_IMAGES, self.generator(exp, *key, c)) for c in slots])

    def _epochs(self, exp: int, it: int, outer: int, synthetic: SyntheticSet) -> list[list[Batch]]:
        """The epochs after this step; none after the last step, nor on ranks other than 0, which trains for all."""
        if outer == self.settings.outer_loop - 1 or not distributed.is_main():
            return []
        s, g = self.settings, self.generator(exp, "inner", it, outer)
        return [draw_epoch(synthetic, s.batch_train, s.dsa, g) for _ in range(s.inner_loop)]
