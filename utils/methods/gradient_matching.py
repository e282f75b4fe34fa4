"""Gradient matching as a method of stage 1: what one iteration does to the synthetic images and outliers."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from networks import get_network, initialize
from utils.compute import distributed
from utils.compute.device import Compute
from utils.core.errors import UserError
from utils.core.rng import generator
from utils.data.augment import identity
from utils.data.datasets import RealData
from utils.data.outliers import OutlierPool, PseudoOutliers
from utils.data.synthetic import SyntheticSet
from utils.methods.match_draws import IterationDraws, MatchSettings, SlotDraw, StepDraw
from utils.methods.matcher import Matcher, class_loss, outlier_loss
from utils.training.draws import Batch
from utils.training.trainer import Trainer, TrainSettings

MOMENTUM_IMG = 0.5


class GradientMatching:
    """The synthetic images of one experiment and what updates them in one iteration.

    The stage-1 loop needs no more of a method than `start`, `iterate`, `synthetic` and the two of its state.
    """

    def __init__(
        self,
        real: RealData,
        outliers: OutlierPool | PseudoOutliers | None,
        settings: MatchSettings,
        compute: Compute | None = None,
        initial: Sequence[SyntheticSet] = (),
    ):
        compute = compute or Compute()
        self.real, self.outliers, self.settings, self.initial = real, outliers, settings, initial
        self.device = real.device
        net = get_network(settings.model, real.channel, real.num_classes, real.im_size, generator(settings.seed))
        self.net = net.to(self.device)
        self.matchers = [Matcher(self.net, loss, settings.metric, compute) for loss in (class_loss, outlier_loss)]
        labels = torch.arange(real.num_classes, device=self.device)
        self.labels = labels.repeat_interleave(settings.ipc)
        training = TrainSettings(
            1, settings.lr_net, settings.batch_train, settings.lambda_oe, settings.dsa, momentum=0.0, weight_decay=0.0
        )
        self.trainer = Trainer(self.net, training, compute)
        self.draws = IterationDraws(real, outliers, settings, self.trainer.has_batchnorm)
        self._check_init()

    def _check_init(self) -> None:
        smallest = min(len(i) for i in self.real.class_indices)
        if self.settings.init == "real" and smallest < self.settings.ipc:
            raise UserError(
                f"--ipc {self.settings.ipc}: the smallest class of {self.real.name} has {smallest} training "
                "images, and "
                "--init real takes that many of each; lower --ipc or use --init noise"
            )

    def start(self, exp: int) -> None:
        """Initialise the synthetic images of experiment `exp`: noise, or real images and real outliers."""
        self.exp = exp
        self.image_syn = self._initial(
            "images", lambda slot, n, g: self.real.train_batch(self.draws.choose(slot, n, g))
        )
        self.optimizers = [self._optimizer(self.image_syn)]
        self.image_oe = None
        if self.outliers is not None:
            self.image_oe = self._initial("outliers", self.outliers.draw)
            self.optimizers.append(self._optimizer(self.image_oe))

    def _initial(self, what: str, draw: Callable[[int, int, torch.Generator], torch.Tensor]) -> torch.Tensor:
        """`[num_classes, ipc, C, H, W]`."""
        s, shape = self.settings, (self.real.channel, *self.real.im_size)
        if self.initial:
            start = self.initial[self.exp % len(self.initial)]
            images = start.images if what == "images" else start.images_oe
            return images.to(self.device).clone().view(self.real.num_classes, s.ipc, *shape)
        slots = []
        for slot in range(self.real.num_classes):
            g = self.draws.generator(self.exp, "initial", what, slot)
            if s.init == "noise":
                slots.append(torch.randn(s.ipc, *shape, generator=g).to(self.device))
                continue
            batch = draw(slot, s.ipc, g)
            slots.append(batch[torch.arange(s.ipc) % len(batch)])  # a small slice of outliers may have fewer
        return torch.stack(slots)

    def _optimizer(self, images: torch.Tensor) -> torch.optim.Optimizer:
        return torch.optim.SGD([images.requires_grad_()], lr=self.settings.lr_img, momentum=MOMENTUM_IMG)

    def iterate(self, it: int) -> dict[str, torch.Tensor]:
        """One iteration on a fresh random network; returns the matching losses `[slots]`, means over outer steps."""
        initialize(self.net, self.draws.generator(self.exp, "network", it))
        self.trainer.restart(self.settings.lr_net)
        losses = []
        for outer, drawn in enumerate(self.draws.steps(self.exp, it, self.synthetic())):
            losses.append(self._matching_step(drawn))
            if outer < self.settings.outer_loop - 1:
                self._train_network(drawn.epochs)
        if self.device.type == "cuda":
            self.draws.look_ahead(self.exp, it + 1, self.synthetic())
        return dict(zip(("loss", "loss_oe"), torch.stack(losses).mean(0).unbind(), strict=False))

    def _train_network(self, epochs: list[list[Batch]]) -> None:
        """Epochs on the synthetic set; rank 0 trains, and the others take over its weights."""
        if distributed.rank() == 0:
            for _ in self.trainer.epochs(self.synthetic(), epochs):
                pass
        distributed.broadcast_(*(t.detach() for t in self.net.state_dict().values()))

    def _matching_step(self, drawn: StepDraw) -> torch.Tensor:
        """Update the images, then the outliers; returns their losses, `[1 or 2, slots]`."""
        self.net.train()
        if drawn.batchnorm is not None:
            self._set_batchnorm(drawn.batchnorm)
        losses = [self._update(0, self.image_syn, self.real.train_batch, drawn.images)]
        if self.outliers is not None:
            losses.append(self._update(1, self.image_oe, self.outliers.batch, drawn.outliers))
        return torch.stack(losses)

    def _update(self, which: int, images: torch.Tensor, batch: Callable, drawn: dict[int, SlotDraw]) -> torch.Tensor:
        """One step of the images (`which` 0) or of the outliers (1); returns the losses of the slots.

        `batch` makes a slot's real batch, on the device, of what was drawn for it.
        """
        transforms = {slot: draw.transform or identity for slot, draw in drawn.items()}
        losses, images.grad = self.matchers[which](images.detach(), lambda slot: batch(drawn[slot].real), transforms)
        self.optimizers[which].step()
        return losses

    def _set_batchnorm(self, index: torch.Tensor) -> None:
        """One training-mode pass over these training images, then freeze every BatchNorm."""
        with torch.no_grad():
            self.net(self.real.train_batch(index))
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def state_dict(self) -> dict:
        """What the next iterations depend on, beside the settings: images, outliers and their momentum, on the CPU."""
        images = [self.image_syn] if self.image_oe is None else [self.image_syn, self.image_oe]
        momentum = [o.state[i].get("momentum_buffer") for o, i in zip(self.optimizers, images, strict=True)]
        return {
            "images": [i.detach().cpu().clone() for i in images],
            "momentum": [None if m is None else m.cpu().clone() for m in momentum],
        }

    def load_state_dict(self, exp: int, state: dict) -> None:
        """Go on in experiment `exp` from a `state_dict`.

        Raises:
            ValueError: when its images are not of this shape, or with outliers where there are none.
        """
        shape = (self.real.num_classes, self.settings.ipc, self.real.channel, *self.real.im_size)
        count = 1 if self.outliers is None else 2
        for tensors in (state["images"], [m for m in state["momentum"] if m is not None]):
            if any(tuple(t.shape) != shape or t.dtype != torch.float32 for t in tensors):
                raise ValueError(f"images of another shape than {'x'.join(map(str, shape))}")
        if not len(state["images"]) == len(state["momentum"]) == count:
            raise ValueError(f"{len(state['images'])} sets of images instead of {count}")
        self.exp = exp
        images = [t.to(self.device).clone() for t in state["images"]]  # a file's may overlap in memory
        self.image_syn, self.image_oe = images[0], images[1] if count == 2 else None
        self.optimizers = [self._optimizer(i) for i in images]
        for optimizer, image, momentum in zip(self.optimizers, images, state["momentum"], strict=True):
            if momentum is not None:
                optimizer.state[image]["momentum_buffer"] = momentum.to(self.device).clone()

    def synthetic(self) -> SyntheticSet:
        """The current synthetic set (views of the images that later iterations update)."""
        oe = None if self.image_oe is None else self.image_oe.detach().flatten(0, 1)
        return SyntheticSet(self.image_syn.detach().flatten(0, 1), self.labels, oe)
