"""The images that a distillation optimises, with their optimisers and state, and what an iteration draws for them.

All that is random in an iteration of gradient or distribution matching is drawn on the CPU and sent together. The
Siamese rule: a `SlotDraw` has one `transform`, which is applied to both the real and the synthetic batch.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from networks import initialize
from utils.compute import distributed
from utils.compute.transfer import Draw, send_draws, tensors_of
from utils.core.errors import UserError, require
from utils.core.rng import generator
from utils.data.augment import DSA, Transform
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet, check_factor, encode
from utils.methods.method import MatchingSettings, MethodInputs
from utils.outliers.distilled import check_start, clamp_to_pixels
from utils.outliers.sources import OutlierBatch, OutlierSource, draw_repeated, k_center_outliers
from utils.training.coresets import FeatureNetworks
from utils.training.draws import Batch, draw_epoch
from utils.training.network_pool import NetworkPool
from utils.training.trainer import LR_NET, TrainSettings, load_optimizer

BATCHNORM_IMAGES = 16  # of each class
DRAWN_NUMBERS = 2**25  # drawn and sent together: a quarter of a gigabyte of indices


def check_class_sizes(real: RealData, outliers: OutlierSource | None, ipc: int, factor: int = 1) -> None:
    """Check that `--init real` finds different images for all `ipc` of each class, and as many outliers of each slot.

    Copies would stay copies in DC, DSA and DM: they are augmented alike and so get the same gradients.

    Raises:
        UserError: when there are fewer.
    """
    needed, smallest = ipc * factor**2, min(map(len, real.class_indices))
    flags = f"--ipc {ipc}" if factor == 1 else f"--ipc {ipc} --factor {factor}"
    takes = f"and --init real takes {'that many' if factor == 1 else needed}"
    require(
        smallest >= needed,
        f"{flags}: the smallest class of {real.name} has {smallest} training images, {takes} of each; lower --ipc or "
        "use --init noise",
    )
    if outliers is not None:
        require(
            outliers.per_slot() >= needed,
            f"{flags}: the outlier source has {outliers.per_slot()} outliers for each class, {takes}; give more "
            "(--oe_data_path, --num_oe_per_class), lower --ipc or use --init noise",
        )


class LearnableSet:
    """Synthetic images, and with an outlier source the same number of synthetic outliers, optimised by SGD.

    The base class of methods: initial values, optimisers and state; a method adds `iterate`.

    `image_syn`, `image_oe` (None without outliers): `[num_classes, ipc, C, H, W]`, normalised, on the device of `real`;
    `optimizers`: one for each of them; `labels`: int64 `[num_classes·ipc]`; `pool`: trained networks to match on, if a
    method sets it; its state is kept with the images.

    `about`, `notices`: what a method adds to `args.json` and to the log.

    Raises:
        UserError: for settings of outliers that contradict each other; `start` raises what `check_class_sizes` does.
    """

    MOMENTUM = 0.5
    pool: NetworkPool | None = None
    fingerprints: Mapping[str, str] = MappingProxyType({})  # of further inputs of a method, by flag

    def __init__(self, inputs: MethodInputs):
        s, real = inputs.settings, inputs.real
        self.settings, self.real, self.outliers, self.initial = s, real, inputs.outliers, inputs.initial
        if self.outliers is not None:
            check_start(s.init_oe, s.init, s.clamp_oe, real, bool(self.initial))
        check_factor(s.factor, real.im_size, "--factor")
        if s.factor > 1 and real.zca is not None:
            raise UserError(f"--factor {s.factor}: whitened images (--zca) cannot be enlarged; give --factor 1")
        self.augmentation = inputs.augmentation
        self.learning_rates = (s.lr_img, s.lr_img if s.lr_img_oe is None else s.lr_img_oe)
        self.device = real.device
        self.labels = torch.arange(real.num_classes, device=self.device).repeat_interleave(s.ipc)
        self.shape = (real.num_classes, s.ipc, real.channel, *real.im_size)
        self.about: dict[str, object] = {}
        self.notices: list[str] = []

    def start(self, exp: int) -> None:
        """Initialise the images (and outliers) of experiment `exp`."""
        if self.settings.init == "real" and not self.initial:
            check_class_sizes(self.real, self.outliers, self.settings.ipc, self.settings.factor)
        images = self._initial(exp, "images", lambda slot, n, g: self.real.train_batch(self.real.choose(slot, n, g)))
        self._set_images(exp, images, None if self.outliers is None else self._initial_outliers(exp, images))

    def _initial_outliers(self, exp: int, images: torch.Tensor) -> torch.Tensor:
        s = self.settings
        if s.init_oe == "kcenter":
            outliers = torch.zeros_like(images)
            if distributed.is_main():
                labelled = SyntheticSet(images.flatten(0, 1), self.labels, factor=s.factor).decoded()
                training = TrainSettings(1, augmentation=self.augmentation)
                net = FeatureNetworks(s.model, self.real, training, s.seed, "off", "fp32").train(labelled)
                chosen = k_center_outliers(self.outliers, s.decoded_ipc, net, s.seed, exp).split(s.decoded_ipc)
                outliers = torch.stack([encode(of_slot, s.factor) for of_slot in chosen])
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
            g = generator(self.settings.seed, "match", exp, "initial", what, slot)
            if self.settings.init == "noise":
                slots.append(torch.randn(self.shape[1:], generator=g).to(self.device))
                continue
            slots.append(encode(draw(slot, self.settings.decoded_ipc, g), self.settings.factor))
        return torch.stack(slots)

    def _set_images(self, exp: int, images: torch.Tensor, outliers: torch.Tensor | None) -> None:
        """Set the images of experiment `exp`, with new optimisers."""
        self.exp = exp
        self.image_syn, self.image_oe = images, outliers
        if self.pool is not None:
            self.pool.clear()
        rates = zip(self._tensors(), self.learning_rates, strict=False)
        self.optimizers = [self.optimizer([images.requires_grad_()], lr) for images, lr in rates]

    def optimizer(self, images: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
        """The optimiser of the images, or of the outliers."""
        return torch.optim.SGD(images, lr=lr, momentum=self.MOMENTUM)

    def reset_network(self, net: nn.Module, g: torch.Generator, it: int) -> None:
        """Give `net` random weights, drawn from `g`, or those of the network of the pool whose turn it is."""
        if self.pool is None:
            initialize(net, g)
        else:
            net.load_state_dict(self.pool.next_network(self.exp, it, self.synthetic().decoded()))

    def update_images(self) -> None:
        """Move the images along their gradient."""
        self.optimizers[0].step()

    def update_outliers(self) -> None:
        """Move the outliers along their gradient, and with `--clamp_oe` back into the range of pixels."""
        self.optimizers[1].step()
        if self.settings.clamp_oe:
            clamp_to_pixels(self.image_oe.detach(), self.real)

    def _tensors(self) -> list[torch.Tensor]:
        return [self.image_syn] if self.image_oe is None else [self.image_syn, self.image_oe]

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set (views of the images that later iterations update)."""
        oe = None if self.image_oe is None else self.image_oe.detach().flatten(0, 1)
        return SyntheticSet(self.image_syn.detach().flatten(0, 1), self.labels, oe, factor=self.settings.factor)

    def state_dict(self) -> dict:
        """Copies of the images, the outliers, their optimisers and the pool: all state that later iterations need."""
        return {
            "images": [i.detach().clone() for i in self._tensors()],
            "optimizers": [deepcopy(optimizer.state_dict()) for optimizer in self.optimizers],
        } | ({} if self.pool is None else {"pool": self.pool.state_dict()})

    def load_state_dict(self, exp: int, state: dict) -> None:
        """Continue experiment `exp` from a `state_dict`.

        Raises:
            ValueError, RuntimeError, KeyError: when its images differ in shape or dtype, outliers are missing or
                unexpected, its pool is another, or older code wrote it.
        """
        count = 1 if self.outliers is None else 2
        if any(tuple(t.shape) != self.shape or t.dtype != torch.float32 for t in state["images"]):
            raise ValueError(f"images of another shape than {'x'.join(map(str, self.shape))}")
        if len(state["images"]) != count:
            raise ValueError(f"{len(state['images'])} sets of images instead of {count}")
        images = [t.to(self.device).clone() for t in state["images"]]  # tensors of a file may share memory
        self._set_images(exp, images[0], images[1] if count == 2 else None)
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"])
        for optimizer, saved in zip(self.optimizers, state.get("optimizers", [None] * count), strict=True):
            load_optimizer(optimizer, saved)


@dataclass(frozen=True)
class SlotDraw(Draw):
    """The random choices for one slot."""

    real: torch.Tensor | OutlierBatch  # its real images (int64 `[n]`) or outliers
    transform: Transform | None  # the augmentation of these and of the synthetic ones


@dataclass(frozen=True)
class StepDraw(Draw):
    """The random choices of one outer step."""

    images: dict[int, SlotDraw]  # by slot
    outliers: dict[int, SlotDraw]
    batchnorm: torch.Tensor | None  # the training images (int64 `[n]`) that set BatchNorm's statistics
    epochs: list[list[Batch]]  # of the network training that follows


class IterationDraws:
    """Makes the draws of the iterations, each from a generator with its own key.

    `has_batchnorm`: whether to draw images for BatchNorm's statistics. `all_slots`: whether every process draws for all
    slots, not only for its own.
    """

    def __init__(
        self,
        inputs: MethodInputs,
        has_batchnorm: bool,
        all_slots: bool = False,
        outer_loop: int = 1,
        inner_loop: int = 0,
    ):
        self.real, self.outliers, self.settings = inputs.real, inputs.outliers, inputs.settings
        self.dsa, self.outer_loop, self.inner_loop = inputs.augmentation, outer_loop, inner_loop
        self.all_slots, self.has_batchnorm = all_slots, has_batchnorm
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
        while outer < self.outer_loop:
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
        last = min(self.outer_loop, first + max(1, DRAWN_NUMBERS // max(1, size)))
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
        return None if self.dsa is None else self.dsa.draw(1, self.real.im_size, self.generator(*key))

    def _batchnorm(self, exp: int, it: int, outer: int) -> torch.Tensor:
        """16 images of each class."""
        slots = range(self.real.num_classes)
        key = ("batchnorm", it, outer)
        return torch.cat([self.real.choose(c, BATCHNORM_IMAGES, self.generator(exp, *key, c)) for c in slots])

    def _epochs(self, exp: int, it: int, outer: int, synthetic: SyntheticSet) -> list[list[Batch]]:
        """The epochs after this step; none after the last step, nor on ranks other than 0, which trains for all."""
        if outer == self.outer_loop - 1 or not distributed.is_main():
            return []
        g = self.generator(exp, "inner", it, outer)
        synthetic = synthetic.decoded()
        return [draw_epoch(synthetic, self.settings.batch, self.dsa, g) for _ in range(self.inner_loop)]


def training_between(s: MatchingSettings, augmentation: DSA | None) -> TrainSettings:
    """How the networks that images are matched on are trained on the synthetic set."""
    return TrainSettings(1, s.lr_net or LR_NET, s.batch, s.lambda_oe, augmentation)


def network_pool(inputs: MethodInputs) -> NetworkPool | None:
    """The networks of `--network_pool`, if there are any."""
    s, training = inputs.settings, training_between(inputs.settings, inputs.augmentation)
    if not s.network_pool:
        return None
    ages = (s.network_pool, s.pool_epochs, s.pool_last_epoch)
    return NetworkPool(inputs.real, s.model, *ages, training, s.seed, inputs.compute)
