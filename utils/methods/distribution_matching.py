"""Distribution matching: DM (Zhao & Bilen, WACV 2023), with and without outliers.

One iteration takes a fresh random network and moves the synthetic images of every class so that the mean of their
features comes closer to that of real images of the class; outliers likewise, slot by slot. It needs no second
derivatives and no network training, so it costs little more than a forward pass of the real images.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from networks import get_network, has_batchnorm, initialize
from utils.compute import distributed
from utils.compute.compiling import Workload
from utils.compute.cpu_batches import BatchSplitter, in_parts
from utils.compute.device import Compute
from utils.core.rng import generator
from utils.data.augment import apply_by_part, apply_by_slot, identity
from utils.data.datasets import RealData
from utils.data.outliers import OutlierSource
from utils.data.synthetic import LearnableSet, SyntheticSet
from utils.methods import MethodEntry, MethodInputs, register
from utils.methods.match_draws import IterationDraws, MatchSettings, SlotDraw

CHUNK_IMAGES = 512  # synthetic images embedded together, to bound the memory


class DistributionMatching(LearnableSet):
    """The synthetic images of one experiment, and the iterations that update them by distribution matching."""

    def __init__(
        self,
        real: RealData,
        outliers: OutlierSource | None,
        settings: MatchSettings,
        compute: Compute | None = None,
        initial: Sequence[SyntheticSet] = (),
    ):
        s = replace(settings, outer_loop=1)
        super().__init__(
            real, outliers, ipc=s.ipc, seed=s.seed, init=s.init, lr_img=s.lr_img, lr_img_oe=s.lr_img_oe, initial=initial
        )
        compute = compute or Compute()
        net = get_network(s.model, real.channel, real.num_classes, real.im_size, generator(s.seed))
        self.net = net.to(self.device).requires_grad_(False)
        self.splitter = BatchSplitter(self.net)
        self.has_batchnorm = has_batchnorm(self.net)
        self.embed_real = compute.function(lambda images: self.net.embed(images))
        self.embed_synthetic = replace(compute, precision="fp32").function(lambda images: self.net.embed(images))
        # BatchNorm needs the images of all classes in one pass, so each process then works on all slots
        self.draws = IterationDraws(real, outliers, s, has_batchnorm=False, all_slots=self.has_batchnorm)
        self.about: dict[str, object] = {}
        self.notices: list[str] = []

    def iterate(self, it: int) -> dict[str, torch.Tensor]:
        """One iteration on a fresh random network; returns losses `[slots]` by name (their sum is eq. 6)."""
        initialize(self.net, self.draws.generator(self.exp, "network", it))
        self.net.train()
        (drawn,) = self.draws.steps(self.exp, it, self.synthetic())
        losses = {"loss": self._update(self.image_syn, self.real.train_batch, drawn.images)}
        self.optimizers[0].step()
        if self.outliers is not None:
            losses["loss_oe"] = self._update(self.image_oe, self.outliers.batch, drawn.outliers)
            self.optimizers[1].step()
        if self.device.type == "cuda":
            self.draws.look_ahead(self.exp, it + 1, self.synthetic())
        return losses

    def _update(self, images: torch.Tensor, batch: Callable, drawn: dict[int, SlotDraw]) -> torch.Tensor:
        """Set the gradient of the images or of the outliers; returns the losses of the slots.

        `batch` makes a slot's real batch, on the device, from its draw.
        """
        transforms = {slot: draw.transform or identity for slot, draw in drawn.items()}
        losses, gradient = images.new_zeros(len(images)), torch.zeros_like(images)
        slots = list(drawn)
        targets = self._real_means({slot: batch(drawn[slot].real) for slot in slots}, transforms) if slots else {}
        size = len(slots) if self.has_batchnorm else max(1, CHUNK_IMAGES // self.ipc)
        for first in range(0, len(slots), max(1, size)):
            chunk = slots[first : first + size]
            some = images.detach()[chunk].requires_grad_()
            augmented = apply_by_slot(some, [transforms[slot] for slot in chunk]).flatten(0, 1)
            means = self.embed_synthetic(augmented).float().unflatten(0, (len(chunk), self.ipc)).mean(1)
            distances = (means - torch.stack([targets[slot] for slot in chunk])).square().sum(1)
            gradient[chunk] = torch.autograd.grad(distances.sum(), some)[0]
            losses[chunk] = distances.detach()
        if self.has_batchnorm:
            distributed.broadcast_(losses, gradient)  # all processes computed all slots, but may round differently
        else:
            distributed.sum_(losses, gradient)
        images.grad = gradient
        return losses

    @torch.no_grad()
    def _real_means(self, batches: dict[int, torch.Tensor], transforms: dict[int, Callable]) -> dict[int, torch.Tensor]:
        """The mean features `[D]` of each slot's augmented real images."""
        if self.has_batchnorm:
            lengths = [len(images) for images in batches.values()]
            images = apply_by_part(torch.cat(list(batches.values())), [transforms[s] for s in batches], lengths)
            parts = self.embed_real(images).float().split(lengths)
            return {slot: part.mean(0) for slot, part in zip(batches, parts, strict=True)}
        return {slot: self._embedded(transforms[slot](images)).mean(0) for slot, images in batches.items()}

    def _embedded(self, images: torch.Tensor) -> torch.Tensor:
        """Features float32 `[n, D]`; copied, because a CUDA graph overwrites its output at the next call."""
        return in_parts(lambda part: self.embed_real(part).float().clone(), images, self.splitter.forward(images))


def _settings(inputs: MethodInputs) -> MatchSettings:
    f = inputs.flags
    return MatchSettings(
        model=f["model"],
        ipc=f["ipc"],
        seed=f["seed"],
        lr_img=f["lr_img"],
        lr_img_oe=f.get("lr_img_oe"),
        batch_real=f["batch_real"],
        batch_oe=f.get("batch_oe", 0),
        init=f["init"],
        dsa=inputs.augmentation,
    )


def _build(inputs: MethodInputs) -> DistributionMatching:
    return DistributionMatching(inputs.real, inputs.outliers, _settings(inputs), inputs.compute, inputs.initial)


def _workload(inputs: MethodInputs) -> Workload:
    """Real images only go forward, which counts as half a pass."""
    s, real = _settings(inputs), inputs.real
    per_class = min(s.batch_real, len(real.images_train) // real.num_classes)
    embedded = real.num_classes * (per_class + (0 if inputs.outliers is None else s.batch_oe))
    synthetic = real.num_classes * s.ipc * (1 if inputs.outliers is None else 2)
    return Workload((embedded / 2 + synthetic) / distributed.world_size(), 1, "matching")


register(
    MethodEntry(
        "DM",
        "distribution matching, the fastest per iteration",
        _build,
        _workload,
        defaults={"Iteration": 20000, "lr_img": 1.0, "init": "real", "eval_interval": 2000},
    )
)
