"""The images that a distillation optimises: their initial values, optimisers and state."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from networks import initialize
from utils.compute import distributed
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.outliers.sources import OutlierSource, draw_repeated
from utils.outliers.start import OutlierRecipe
from utils.training.network_pool import NetworkPool

SHARED = ("ipc", "seed", "init", "lr_img", "lr_img_oe", "recipe")


def shared_settings(settings: object) -> dict[str, Any]:
    """The fields of a method's settings that are arguments of `LearnableSet`."""
    return {name: getattr(settings, name) for name in SHARED}


def check_enough(real: RealData, outliers: OutlierSource | None, ipc: int) -> None:
    """Check that `--init real` finds `ipc` different images of each class, and as many outliers of each slot.

    Copies would stay copies in DC, DSA and DM: they are augmented alike and so get the same gradients.

    Raises:
        UserError: when there are fewer.
    """
    smallest = min(len(i) for i in real.class_indices)
    if smallest < ipc:
        raise UserError(
            f"--ipc {ipc}: the smallest class of {real.name} has {smallest} training images, and --init real takes "
            "that many of each; lower --ipc or use --init noise"
        )
    if outliers is not None and outliers.per_slot() < ipc:
        raise UserError(
            f"--ipc {ipc}: the outlier source has {outliers.per_slot()} outliers for each class, and --init real takes "
            "that many; give more (--oe_data_path, --num_oe_per_class), lower --ipc or use --init noise"
        )


class LearnableSet:
    """Synthetic images, and with an outlier source the same number of synthetic outliers, optimised by SGD.

    The base class of methods: initial values, optimisers and state; a method adds `iterate`.

    `image_syn`, `image_oe` (None without outliers): `[num_classes, ipc, C, H, W]`, normalised, on the device of `real`;
    `optimizers`: one for each of them; `labels`: int64 `[num_classes·ipc]`; `pool`: trained networks to match on, if a
    method sets it; its state is kept with the images.

    Args:
        init: `noise`, or `real` for real images of the class and real outliers of the slot.
        lr_img: learning rate of the images; lr_img_oe: that of the outliers (default: the same).
        initial: distilled sets to start the experiments from, in turn, instead of `init`.
        recipe: how outliers start and where they are kept; default: as published.
    Raises:
        UserError: for a recipe that cannot be followed; `start` raises what `check_enough` does.
    """

    MOMENTUM = 0.5
    pool: NetworkPool | None = None
    fingerprints: Mapping[str, str] = MappingProxyType({})  # of further inputs of a method, by flag

    def __init__(
        self,
        real: RealData,
        outliers: OutlierSource | None,
        *,
        ipc: int,
        seed: int,
        init: str,
        lr_img: float,
        lr_img_oe: float | None = None,
        initial: Sequence[SyntheticSet] = (),
        recipe: OutlierRecipe | None = None,
    ):
        self.real, self.outliers, self.initial = real, outliers, initial
        self.recipe = recipe or OutlierRecipe()
        self.recipe.check(real, init, bool(initial))
        self.ipc, self.seed, self.init = ipc, seed, init
        self.learning_rates = (lr_img, lr_img if lr_img_oe is None else lr_img_oe)
        self.device = real.device
        self.labels = torch.arange(real.num_classes, device=self.device).repeat_interleave(ipc)
        self.shape = (real.num_classes, ipc, real.channel, *real.im_size)

    def start(self, exp: int) -> None:
        """Initialise the images (and outliers) of experiment `exp`."""
        if self.init == "real" and not self.initial:
            check_enough(self.real, self.outliers, self.ipc)
        images = self._initial(exp, "images", lambda slot, n, g: self.real.train_batch(self.real.choose(slot, n, g)))
        self._hold(exp, images, None if self.outliers is None else self._initial_outliers(exp, images))

    def _initial_outliers(self, exp: int, images: torch.Tensor) -> torch.Tensor:
        if self.recipe.start == "kcenter":
            outliers = torch.zeros_like(images)
            if distributed.is_main():
                labelled = SyntheticSet(images.flatten(0, 1), self.labels)
                outliers = self.recipe.first_outliers(self.outliers, labelled, self.real, self.seed, exp)
            distributed.broadcast_(outliers)  # a network that is trained elsewhere may choose others
            return outliers
        return self._initial(exp, "outliers", lambda slot, n, g: draw_repeated(self.outliers, slot, n, g))

    def _initial(self, exp: int, what: str, draw: Callable[[int, int, torch.Generator], torch.Tensor]) -> torch.Tensor:
        """The initial images or outliers; `draw` returns `n` real ones of a slot."""
        if self.initial:
            start = self.initial[exp % len(self.initial)]
            images = start.images if what == "images" else start.images_oe
            return images.to(self.device).clone().view(self.shape)
        slots = []
        for slot in range(self.shape[0]):
            g = generator(self.seed, "match", exp, "initial", what, slot)
            if self.init == "noise":
                slots.append(torch.randn(self.shape[1:], generator=g).to(self.device))
                continue
            slots.append(draw(slot, self.ipc, g))
        return torch.stack(slots)

    def _hold(self, exp: int, images: torch.Tensor, outliers: torch.Tensor | None) -> None:
        """Set the images of experiment `exp`, with new optimisers."""
        self.exp = exp
        self.image_syn, self.image_oe = images, outliers
        if self.pool is not None:
            self.pool.empty()
        self.optimizers = [
            torch.optim.SGD([i.requires_grad_()], lr=lr, momentum=self.MOMENTUM)
            for i, lr in zip(self._tensors(), self.learning_rates, strict=False)
        ]

    def renew(self, net: nn.Module, g: torch.Generator, it: int) -> None:
        """Give `net` random weights, drawn from `g`, or those of the network of the pool whose turn it is."""
        if self.pool is None:
            initialize(net, g)
        else:
            net.load_state_dict(self.pool.take(self.exp, it, self.synthetic()))

    def update_images(self) -> None:
        """Move the images along their gradient."""
        self.optimizers[0].step()

    def update_outliers(self) -> None:
        """Move the outliers along their gradient, and keep them where the recipe wants them."""
        self.optimizers[1].step()
        self.recipe.project(self.image_oe.detach(), self.real)

    def _tensors(self) -> list[torch.Tensor]:
        return [self.image_syn] if self.image_oe is None else [self.image_syn, self.image_oe]

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set (views of the images that later iterations update)."""
        oe = None if self.image_oe is None else self.image_oe.detach().flatten(0, 1)
        return SyntheticSet(self.image_syn.detach().flatten(0, 1), self.labels, oe)

    def state_dict(self) -> dict:
        """Copies of the images, the outliers, their momentum and the pool: all state that later iterations need."""
        images = self._tensors()
        momentum = [o.state[i].get("momentum_buffer") for o, i in zip(self.optimizers, images, strict=True)]
        return {
            "images": [i.detach().clone() for i in images],
            "momentum": [None if m is None else m.clone() for m in momentum],
        } | ({} if self.pool is None else {"pool": self.pool.state_dict()})

    def load_state_dict(self, exp: int, state: dict) -> None:
        """Continue experiment `exp` from a `state_dict`.

        Raises:
            ValueError, RuntimeError, KeyError: when its images differ in shape or dtype, outliers are missing or
                unexpected, or its pool is another.
        """
        count = 1 if self.outliers is None else 2
        for tensors in (state["images"], [m for m in state["momentum"] if m is not None]):
            if any(tuple(t.shape) != self.shape or t.dtype != torch.float32 for t in tensors):
                raise ValueError(f"images of another shape than {'x'.join(map(str, self.shape))}")
        if not len(state["images"]) == len(state["momentum"]) == count:
            raise ValueError(f"{len(state['images'])} sets of images instead of {count}")
        images = [t.to(self.device).clone() for t in state["images"]]  # tensors of a file may share memory
        self._hold(exp, images[0], images[1] if count == 2 else None)
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"])
        for optimizer, image, momentum in zip(self.optimizers, images, state["momentum"], strict=True):
            if momentum is not None:
                optimizer.state[image]["momentum_buffer"] = momentum.to(self.device).clone()
