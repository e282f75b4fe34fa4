"""The images that a distillation optimises, with their optimisers and state, and what an iteration draws for them."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy

import torch
from torch import Tensor

from utils.compute import distributed
from utils.compute.transfer import send_draws
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import identity
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet, check_factor, encode
from utils.methods.method import MethodInputs
from utils.outliers.distilled import check_start, clamp_to_pixels
from utils.outliers.sources import OutlierSource, draw_repeated, k_center_outliers
from utils.training.coresets import FeatureNetworks, check_ipc
from utils.training.trainer import TrainSettings, load_optimizer

KINDS = ("", " oe")  # of images and outliers, in the keys of their draws


def check_class_sizes(real: RealData, outliers: OutlierSource | None, ipc: int, factor: int = 1) -> None:
    """Raise `UserError` unless `--init real` finds different images for all `ipc` of each class, and as many outliers.

    Copies would stay copies in DC, DSA and DM: they are augmented alike and so get the same gradients.
    """
    cure, needed = "lower --ipc or use --init noise", ipc * factor**2
    check_ipc(real, ipc, factor, cure)
    if outliers is not None and outliers.per_slot() < needed:
        has = f"the outlier source has {outliers.per_slot()} outliers for each class, and it takes {needed}"
        raise UserError(f"--ipc {ipc}: {has}; give more (--oe_data_path, --num_oe_per_class), {cure}")


class LearnableSet:
    """Synthetic images, and with an outlier source the same number of synthetic outliers, optimised by SGD.

    The base class of methods: initial values, optimisers and state; a method adds `iterate`.
    """

    MOMENTUM = 0.5
    all_slots = False  # whether every process matches all slots, and not only its own
    KEEPS_PIXELS = False  # whether images and outliers stay pixels, whatever --clamp_oe says; whitened ones are none
    image_syn: Tensor  # [num_classes, ipc, C, H, W], normalised, on the device of `real`
    image_oe: Tensor | None  # likewise; None without outliers

    def __init__(self, inputs: MethodInputs):
        s, real = inputs.settings, inputs.real
        self.settings, self.real, self.outliers, self.initial = s, real, inputs.outliers, inputs.initial
        if self.outliers is not None:
            check_start(s.init_oe, s.init, s.clamp_oe, real, bool(self.initial))
        check_factor(s.factor, real.im_size, "--factor")
        if s.factor > 1 and real.zca is not None:
            raise UserError(f"--factor {s.factor}: whitened images (--zca) cannot be enlarged; give --factor 1")
        self.device, self.augmentation = real.device, inputs.augmentation
        self.labels = torch.arange(real.num_classes, device=self.device).repeat_interleave(s.ipc)
        self.shape = (real.num_classes, s.ipc, real.channel, *real.im_size)
        self.about: dict[str, object] = {}  # what a method adds to `args.json`
        self.notices: list[str] = []  # and to the log
        self.fingerprints: dict[str, str] = {}  # of its further inputs, by flag

    def start(self, exp: int) -> None:
        """Initialise the images (and outliers) of experiment `exp`."""
        s, outliers = self.settings, None
        if s.init == "real" and not self.initial:
            check_class_sizes(self.real, self.outliers, s.ipc, s.factor)
        images = self._initial(exp, "images")
        if self.outliers is not None:
            outliers = self._k_center(exp, images) if s.init_oe == "kcenter" else self._initial(exp, "outliers")
        self._set_images(exp, images, outliers)

    def _initial(self, exp: int, what: str) -> Tensor:
        """The initial `images` or `outliers`: those of `--load_path`, noise, or real ones."""
        s = self.settings
        if self.initial:
            start = self.initial[exp % len(self.initial)]
            images = start.images if what == "images" else start.images_oe
            return images.to(self.device).clone().view(self.shape)
        slots = []
        for slot in range(self.real.num_classes):
            g = generator(s.seed, "match", exp, "initial", what, slot)
            if s.init == "noise":
                slots.append(torch.randn(self.shape[1:], generator=g).to(self.device))
            elif what == "images":
                slots.append(encode(self.real.train_batch(self.real.choose(slot, s.decoded_ipc, g)), s.factor))
            else:
                slots.append(encode(draw_repeated(self.outliers, slot, s.decoded_ipc, g), s.factor))
        return torch.stack(slots)

    def _k_center(self, exp: int, images: Tensor) -> Tensor:
        s, outliers = self.settings, torch.zeros_like(images)
        if distributed.is_main():
            labelled = SyntheticSet(images.flatten(0, 1), self.labels, factor=s.factor).decoded()
            training = TrainSettings(1, augmentation=self.augmentation)
            net = FeatureNetworks(s.model, self.real, training, s.seed, "off", "fp32").train(labelled)
            chosen = k_center_outliers(self.outliers, s.decoded_ipc, net, s.seed, exp).split(s.decoded_ipc)
            outliers = torch.stack([encode(of_slot, s.factor) for of_slot in chosen])
        distributed.broadcast_(outliers)  # a network that is trained elsewhere may choose others
        return outliers

    def _set_images(self, exp: int, images: Tensor, outliers: Tensor | None) -> None:
        self.exp, self.image_syn, self.image_oe = exp, images, outliers
        s = self.settings
        rates = (s.lr_img, s.lr_img if s.lr_img_oe is None else s.lr_img_oe)
        pairs = zip(self._tensors(), rates, strict=False)
        self.optimizers = [self.optimizer([images.requires_grad_()], lr) for images, lr in pairs]

    def optimizer(self, images: list[Tensor], lr: float) -> torch.optim.Optimizer:
        """The optimiser of the images, or of the outliers."""
        return torch.optim.SGD(images, lr=lr, momentum=self.MOMENTUM)

    def update(self, which: int) -> None:
        """Move the images (0) or the outliers (1) along their gradient; back into the range of pixels, if so wanted."""
        self.optimizers[which].step()
        if (self.KEEPS_PIXELS and self.real.zca is None) or (which == 1 and self.settings.clamp_oe):
            clamp_to_pixels(self._tensors()[which].detach(), self.real)

    def generator(self, *key: int | str) -> torch.Generator:
        """The generator of a draw in this experiment."""
        return generator(self.settings.seed, "match", self.exp, *key)

    def _slots(self) -> Iterable[int]:
        """The slots that this process matches."""
        slots = self.real.num_classes
        return range(slots) if self.all_slots else distributed.own_share(slots)

    def transforms(self, which: int, it: int, outer: int = 0) -> dict[int, Callable]:
        """By slot, what augments both the real and the synthetic images (0) or outliers (1): the Siamese rule."""
        dsa, key, size = self.augmentation, (f"siamese{KINDS[which]}", it, outer), self.real.im_size
        if dsa is None:
            return dict.fromkeys(self._slots(), identity)
        drawn = {slot: dsa.draw(1, size, self.generator(*key, slot)) for slot in self._slots()}
        return send_draws(drawn, self.device)

    def batches(self, which: int, it: int, outer: int = 0) -> Iterator[Tensor]:
        """The real images (0) or outliers (1) `[n, C, H, W]` of each slot, made one by one."""
        for slot in self._slots():
            g = self.generator(f"real{KINDS[which]}", it, outer, slot)
            if which:
                yield self.outliers.draw(slot, self.settings.batch_oe, g)
            else:
                yield self.real.train_batch(self.real.choose(slot, self.settings.batch_real, g))

    def _tensors(self) -> list[Tensor]:
        return [self.image_syn] if self.image_oe is None else [self.image_syn, self.image_oe]

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set (views of the images that later iterations update)."""
        oe = None if self.image_oe is None else self.image_oe.detach().flatten(0, 1)
        return SyntheticSet(self.image_syn.detach().flatten(0, 1), self.labels, oe, factor=self.settings.factor)

    def state_dict(self) -> dict:
        """Copies of the images, the outliers and their optimisers: all state that later iterations need."""
        return {
            "images": [i.detach().clone() for i in self._tensors()],
            "optimizers": [deepcopy(optimizer.state_dict()) for optimizer in self.optimizers],
        }

    def load_state_dict(self, exp: int, state: dict) -> None:
        """Continue experiment `exp` from a `state_dict`. `ValueError`, `RuntimeError` or `KeyError` tells that it is of
        another run, or that older code wrote it."""
        count = 1 if self.outliers is None else 2
        if any(tuple(t.shape) != self.shape or t.dtype != torch.float32 for t in state["images"]):
            raise ValueError(f"images of another shape than {'x'.join(map(str, self.shape))}")
        if len(state["images"]) != count:
            raise ValueError(f"{len(state['images'])} sets of images instead of {count}")
        images = [t.to(self.device).clone() for t in state["images"]]  # tensors of a file may share memory
        self._set_images(exp, images[0], images[1] if count == 2 else None)
        for optimizer, saved in zip(self.optimizers, state.get("optimizers", [None] * count), strict=True):
            load_optimizer(optimizer, saved)
