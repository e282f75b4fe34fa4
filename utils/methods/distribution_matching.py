"""Distribution matching: DM (Zhao & Bilen, WACV 2023), with and without outliers.

One iteration takes a fresh random network and moves the synthetic images of every class so that the mean of their
features comes closer to that of real images of the class; outliers likewise, slot by slot. It needs no second
derivatives and no network training, so it costs little more than a forward pass of the real images.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from networks import has_batchnorm
from utils.compute import distributed
from utils.compute.cpu_batches import BatchSplitter, in_parts
from utils.compute.device import Workload, batches
from utils.core.rng import generator
from utils.data.augment import apply_by_part, apply_by_slot, identity
from utils.data.synthetic import decode_slots, on_stored
from utils.methods.learnable import IterationDraws, LearnableSet, SlotDraw, network_pool
from utils.methods.method import MatchingSettings, MethodEntry, MethodInputs
from utils.outliers.distilled import push_apart

CHUNK_IMAGES = 512  # synthetic images embedded together, to bound the memory


class FeatureMatching(LearnableSet):
    """Synthetic images whose features on a network are matched to those of real ones, slot by slot.

    A method says which network an iteration takes (`load_network`), and may add losses and another distance.

    `GRADIENT_IN_BF16`: whether `--precision bf16` holds for the gradient of the synthetic images, too.
    """

    GRADIENT_IN_BF16 = False

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
        # BatchNorm needs the images of all classes in one pass, so each process then works on all slots
        self.draws = IterationDraws(inputs, has_batchnorm=False, all_slots=self.has_batchnorm)

    def load_network(self, it: int) -> None:
        """Give `net` the parameters of iteration `it`, in training mode."""
        raise NotImplementedError

    def more_losses(self, it: int) -> dict[str, torch.Tensor]:
        """Add the gradients of further losses to those of matching; returns the losses by name."""
        return {}

    def iterate(self, it: int) -> dict[str, torch.Tensor]:
        """One iteration; returns losses `[slots]` by name."""
        self.load_network(it)
        (drawn,) = self.draws.steps(self.exp, it, self.synthetic())
        batches = (self.real.train_batch(draw.real) for draw in drawn.images.values())
        losses = {"loss": self._update(self.image_syn, batches, drawn.images)}
        if self.outliers is not None:
            batches = (self.outliers.batch(draw.real) for draw in drawn.outliers.values())
            losses["loss_oe"] = self._update(self.image_oe, batches, drawn.outliers)
        losses |= self.more_losses(it)
        self.update_images()
        if self.outliers is not None:
            self.update_outliers()
        if self.device.type == "cuda":
            self.draws.look_ahead(self.exp, it + 1, self.synthetic())
        return losses

    def _update(
        self, images: torch.Tensor, batches: Iterable[torch.Tensor], drawn: dict[int, SlotDraw]
    ) -> torch.Tensor:
        """Set the gradient of the images or of the outliers; returns the losses of the slots.

        `batches`: the real batch of each slot in `drawn`.
        """
        transforms = {slot: draw.transform or identity for slot, draw in drawn.items()}
        factor, ipc = self.settings.factor, self.settings.decoded_ipc
        decoded = decode_slots(images.detach(), factor)
        losses, gradient = images.new_zeros(len(images)), torch.zeros_like(decoded)
        slots = list(drawn)
        features = self._real_features(dict(zip(slots, batches, strict=True)), transforms) if slots else {}
        targets = {slot: self.target(of_slot) for slot, of_slot in features.items()}
        for chunk in self._chunks(slots, decoded):
            some = decoded[chunk].requires_grad_()
            augmented = apply_by_slot(some, [transforms[slot] for slot in chunk]).flatten(0, 1)
            found = self.embed_synthetic(augmented).float().unflatten(0, (len(chunk), ipc))
            distances = self.distance(found, torch.stack([targets[slot] for slot in chunk]))
            gradient[chunk] = torch.autograd.grad(distances.sum(), some)[0]
            losses[chunk] = distances.detach()
        if self.has_batchnorm:
            distributed.broadcast_(losses, gradient)  # all processes computed all slots, but may round differently
        else:
            distributed.sum_(losses, gradient)
        images.grad = on_stored(images, factor, gradient)
        return losses

    def _chunks(self, slots: list[int], decoded: torch.Tensor) -> Iterator[list[int]]:
        """The slots whose images `[slots, n, C, H, W]` are embedded together: with BatchNorm all of them; on a CPU
        those whose activations stay in the cache."""
        count, n = 1, decoded.shape[1]
        if slots and not self.has_batchnorm:
            own = decoded.flatten(0, 1)[: len(slots) * n]
            count = max(-(-len(own) // max(n, CHUNK_IMAGES)), self.gradient_splitter.count(own, len(slots)))
        size = max(1, -(-len(slots) // count))
        return (slots[first : first + size] for first in range(0, len(slots), size))

    def target(self, features: torch.Tensor) -> torch.Tensor:
        """What the features `[n, D]` of a slot's real images are matched by: their mean."""
        return features.mean(0)

    def distance(self, features: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The distance `[slots]` of synthetic features `[slots, n, D]` to the targets of the slots."""
        return (features.mean(1) - targets).square().sum(1)

    @torch.no_grad()
    def _real_features(
        self, batches: dict[int, torch.Tensor], transforms: dict[int, Callable]
    ) -> dict[int, torch.Tensor]:
        """The features `[n, D]` of each slot's augmented real images."""
        if self.has_batchnorm:
            lengths = [len(images) for images in batches.values()]
            images = apply_by_part(torch.cat(list(batches.values())), [transforms[s] for s in batches], lengths)
            return dict(zip(batches, self.embed_real(images).float().split(lengths), strict=True))
        return {slot: self._embedded(transforms[slot](images)) for slot, images in batches.items()}

    def _embedded(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 `[n, D]`; copied, because a CUDA graph overwrites its output at the next call."""
        return in_parts(lambda part: self.embed_real(part).float().clone(), images, self.splitter.count(images))


class DistributionMatching(FeatureMatching):
    """The synthetic images of one experiment; the sum of the losses of an iteration is eq. 6."""

    settings: MatchingSettings

    def __init__(self, inputs: MethodInputs):
        super().__init__(inputs)
        self.pool = network_pool(inputs)

    def load_network(self, it: int) -> None:
        """A fresh random network, or one of the pool."""
        self.reset_network(self.net, self.draws.generator(self.exp, "network", it), it)
        self.net.train()

    def more_losses(self, it: int) -> dict[str, torch.Tensor]:
        """Keep outliers apart, if the settings say so; its loss is not reported."""
        if self.outliers is not None:
            push_apart(self.net, self.image_oe, self.settings.spread_oe, self.settings.factor)
        return {}


def _workload(inputs: MethodInputs) -> Workload:
    """Real images only go forward, which counts as half a pass."""
    s, real = inputs.settings, inputs.real
    per_class = min(s.batch_real, len(real.images_train) // real.num_classes)
    embedded = real.num_classes * (per_class + (0 if inputs.outliers is None else s.batch_oe))
    synthetic = real.num_classes * s.decoded_ipc * (1 if inputs.outliers is None else 2)
    trained = s.pool_epochs * synthetic if s.network_pool else 0
    shared = distributed.world_size()
    passes = (embedded / 2 + synthetic) / shared + trained
    steps = 1 + (s.pool_epochs * batches(real.num_classes * s.decoded_ipc, s.batch) if s.network_pool else 0)
    return Workload(passes, steps, "features")


DM_ENTRY = MethodEntry(
    "DM",
    "distribution matching, the fastest per iteration",
    DistributionMatching,
    _workload,
    MatchingSettings,
    defaults={"Iteration": 20000, "lr_img": 1.0, "init": "real", "eval_interval": 2000},
)
