"""Distribution matching: DM (Zhao & Bilen, WACV 2023), with and without outliers.

One iteration takes a fresh random network and moves the synthetic images of every class so that the mean of their
features comes closer to that of real images of the class; outliers likewise, slot by slot. It needs no second
derivatives and no network training, so it costs little more than a forward pass of the real images.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from networks import has_batchnorm, initialize
from utils.compute import distributed
from utils.compute.cpu_batches import BatchSplitter, in_parts
from utils.compute.device import Workload
from utils.core.rng import generator
from utils.data.augment import apply_by_part, apply_by_slot
from utils.data.synthetic import decode_slots, on_stored
from utils.methods.distances import mean_distance
from utils.methods.learnable import LearnableSet
from utils.methods.method import MatchingSettings, MethodEntry, MethodInputs
from utils.outliers.distilled import push_apart

CHUNK_IMAGES = 512  # synthetic images embedded together, to bound the memory


class DistributionMatching(LearnableSet):
    """The synthetic images of one experiment; the sum of the losses of an iteration is eq. 6.

    A subclass may match the features of other networks (`load_network`), add losses, and have another distance.
    """

    settings: MatchingSettings
    GRADIENT_IN_BF16 = False  # whether `--precision bf16` holds for the gradient of the synthetic images, too

    def __init__(self, inputs: MethodInputs):
        super().__init__(inputs)
        s, compute = self.settings, inputs.compute
        self.net = self.real.network(s.model, generator(s.seed)).to(self.device).requires_grad_(False)
        self.splitter = BatchSplitter(self.net, compute.precision)
        self.has_batchnorm = has_batchnorm(self.net)
        self.embed_real = compute.function(lambda images: self.net.embed(images))
        of_gradient = compute if self.GRADIENT_IN_BF16 else replace(compute, precision="fp32")
        self.embed_synthetic = of_gradient.function(lambda images: self.net.embed(images))
        self.gradient_splitter = BatchSplitter(self.net, of_gradient.precision)
        self.all_slots = self.has_batchnorm  # which needs the images of all classes in one pass

    def load_network(self, it: int) -> None:
        """Give `net` the parameters of iteration `it`, those of a fresh random network, in training mode."""
        initialize(self.net, self.generator("network", it))
        self.net.train()

    def more_losses(self, it: int) -> dict[str, Tensor]:
        """Add the gradients of further losses to those of matching; returns the losses by name."""
        return {}

    def iterate(self, it: int) -> dict[str, Tensor]:
        """One iteration; returns losses `[slots]` by name. With `--spread_oe` outliers are kept apart, too."""
        self.load_network(it)
        losses = {"loss": self._update(0, it)}
        if self.outliers is not None:
            losses["loss_oe"] = self._update(1, it)
        losses |= self.more_losses(it)
        self.update(0)
        if self.outliers is not None:
            push_apart(self.net, self.image_oe, self.settings.spread_oe, self.settings.factor)
            self.update(1)
        return losses

    def _update(self, which: int, it: int) -> Tensor:
        """Set the gradient of the images (0) or of the outliers (1); returns the losses of the slots."""
        images, drawn = self._tensors()[which], self.transforms(which, it)
        slots, transforms = list(drawn), list(drawn.values())
        decoded = decode_slots(images.detach(), self.settings.factor)
        losses, gradient = images.new_zeros(len(images)), torch.zeros_like(decoded)
        targets = [self.target(features) for features in self._real_features(self.batches(which, it), transforms)]
        size = self._slots_together(len(slots), decoded)
        for first in range(0, len(slots), size):
            part = slice(first, first + size)
            some = decoded[slots[part]].requires_grad_()
            augmented = apply_by_slot(some, transforms[part]).flatten(0, 1)
            found = self.embed_synthetic(augmented).float().unflatten(0, some.shape[:2])
            distances = self.distance(found, torch.stack(targets[part]))
            gradient[slots[part]] = torch.autograd.grad(distances.sum(), some)[0]
            losses[slots[part]] = distances.detach()
        if self.has_batchnorm:
            distributed.broadcast_(losses, gradient)  # all processes computed all slots, but may round differently
        else:
            distributed.sum_(losses, gradient)
        images.grad = on_stored(images, self.settings.factor, gradient)
        return losses

    def _slots_together(self, slots: int, decoded: Tensor) -> int:
        """Of how many slots the images `[slots, n, C, H, W]` are embedded together: with BatchNorm of all; on a CPU of
        those whose activations stay in the cache."""
        if self.has_batchnorm or not slots:
            return max(1, slots)
        own = decoded[:slots].flatten(0, 1)
        parts = -(-len(own) // max(decoded.shape[1], CHUNK_IMAGES))
        return -(-slots // max(parts, self.gradient_splitter.count(own, slots)))

    @torch.no_grad()
    def _real_features(self, batches: Iterable[Tensor], transforms: Sequence[Callable]) -> Sequence[Tensor]:
        """The features `[n, D]` of each slot's augmented real images."""
        if self.has_batchnorm:
            batches = list(batches)
            lengths = [len(images) for images in batches]
            return self.embed_real(apply_by_part(torch.cat(batches), transforms, lengths)).float().split(lengths)
        embed = lambda part: self.embed_real(part).float().clone()  # noqa: E731 - a CUDA graph overwrites its output
        augmented = (transform(images) for transform, images in zip(transforms, batches, strict=True))
        return [in_parts(embed, images, self.splitter.count(images)) for images in augmented]

    def target(self, features: Tensor) -> Tensor:
        """What the features `[n, D]` of a slot's real images are matched by: their mean."""
        return features.mean(0)

    def distance(self, features: Tensor, targets: Tensor) -> Tensor:
        """The distance `[slots]` of synthetic features `[slots, n, D]` to the targets of the slots."""
        return mean_distance(features, targets)


def feature_workload(inputs: MethodInputs, networks: int = 1) -> Workload:
    """The work of an iteration: real images only go forward, half a pass; synthetic ones through `networks`."""
    synthetic = networks * inputs.kinds * inputs.real.num_classes * inputs.settings.decoded_ipc
    return Workload((inputs.batch_images / 2 + synthetic) / distributed.world_size(), "features")


DM_ENTRY = MethodEntry(
    "DM",
    "distribution matching, the fastest per iteration",
    DistributionMatching,
    feature_workload,
    MatchingSettings,
    defaults={"Iteration": 20000, "lr_img": 1.0, "init": "real", "eval_interval": 2000},
)
