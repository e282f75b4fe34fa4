"""Several networks of one kind trained simultaneously on a synthetic set, each from its own weights and draws.

One small network does not keep a GPU busy, and an MLP not even a CPU. So the weights are stacked and run through
`torch.func`. Up to rounding, the result is that of `Trainer` on one network after another.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import islice

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from networks import has_batchnorm, initialize
from utils.compute.device import Compute, forward_flops
from utils.core.errors import UserError, one_line
from utils.core.rng import generator
from utils.data.synthetic import SyntheticSet
from utils.training.draws import Batch, augmented_batches
from utils.training.losses import joint_loss
from utils.training.trainer import Trainer, TrainSettings

STACKED_PIXELS_CPU = 40 * 8 * 8  # most pixels in one step of one network with convolutions
STACKED_FLOPS_CUDA = 2e10  # most FLOPs in one step of one network: about 0.1 ms on a GPU


def stacking_is_faster(net: nn.Module, images: tuple[int, ...], compute: Compute) -> bool:
    """Whether several networks train faster simultaneously than one after another.

    Args:
        images: shape `[N, C, H, W]` of the images in one step of one network.

    On a CPU: for networks without convolutions, and for others on very few pixels if nothing is compiled. Stacked
    convolutions become a grouped one, which is slower (measured with five networks: MLP 1.2 to 2.2 times as fast,
    ConvNetD2 on 20 images of 8×8 1.5 times, ConvNetW32 on 20 of 32×32 0.9 times). On CUDA, not measured yet: while a
    step is too small to fill the device. Networks with BatchNorm, which have running statistics, are never stacked.
    """
    if has_batchnorm(net):
        return False
    if compute.on_cuda:
        return 3 * images[0] * forward_flops(net, tuple(images[1:])) <= STACKED_FLOPS_CUDA
    if not any(isinstance(m, nn.Conv2d) for m in net.modules()):
        return True
    return not compute.compiled and images[0] * images[2] * images[3] <= STACKED_PIXELS_CPU


class StackedTrainer(Trainer):
    """Trains networks like `net` simultaneously; each is copied into `net` to be tested.

    Like `Trainer`, but with a key, a generator and a loss for each network.
    """

    trains_simultaneously = True

    def __init__(self, net: nn.Module, settings: TrainSettings, compute: Compute | None = None):
        self.stacked = {name: p.detach()[None].clone().requires_grad_() for name, p in net.named_parameters()}
        super().__init__(net, settings, compute)
        self.compute = compute or Compute()
        self.one_by_one: Trainer | None = None  # replaces this trainer once stacking has failed
        self.loss = self.compute.function(self._losses)

    def networks(
        self,
        synthetic: SyntheticSet,
        seed: int,
        keys: Mapping[int, tuple],
        after_epoch: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Iterator[int]:
        """Like `Trainer.networks`, but all are trained before the first is yielded.

        If that fails, e.g. for lack of memory, they are trained one after another.
        """
        if keys and self.one_by_one is None:
            self.stacked = self._fresh(seed, keys.values())
            try:
                self.train(synthetic, seed, tuple(keys.values()), after_epoch)
            except (RuntimeError, UserError) as error:
                reason = one_line(error)
                warnings.warn(f"networks are trained one after another, not simultaneously: {reason}", stacklevel=2)
                self._fall_back()
        if self.one_by_one is not None:
            yield from self.one_by_one.networks(synthetic, seed, keys, after_epoch)
            return
        for position, index in enumerate(keys):
            for name, p in self.net.named_parameters():
                p.detach().copy_(self.stacked[name].detach()[position])
            yield index

    def _fresh(self, seed: int, keys: Iterable[tuple]) -> dict[str, torch.Tensor]:
        """The weights of a fresh network for each key, by parameter, `[networks, …]`."""
        nets = [initialize(deepcopy(self.net), generator(seed, *key)) for key in keys]
        return stack_module_state(nets)[0]

    def _fall_back(self) -> None:
        """Train one network after another from now on, and release the memory of the stacked ones."""
        self.stacked, self.loss = {}, None
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer = None
        self.one_by_one = Trainer(self.net, self.settings, self.compute)
        if self.compute.on_cuda:
            torch.cuda.empty_cache()

    def draw_epochs(
        self, synthetic: SyntheticSet, generators: Sequence[Sequence[torch.Generator]]
    ) -> list[list[list[Batch]]]:
        """Like `Trainer.draw_epochs`; `generators`: by epoch and network; the draws: by epoch, step and network."""
        epochs = [super(StackedTrainer, self).draw_epochs(synthetic, of_epoch) for of_epoch in generators]
        return [list(map(list, zip(*of_epoch, strict=True))) for of_epoch in epochs]

    def epochs(self, synthetic: SyntheticSet, drawn: Sequence[list[list[Batch]]]) -> Iterator[torch.Tensor]:
        """Like `Trainer.epochs`; yields the networks' mean losses `[networks]`."""
        inputs = augmented_batches(synthetic, [batch for of_epoch in drawn for step in of_epoch for batch in step])
        for of_epoch in drawn:
            self.net.train()
            steps = [map(torch.stack, zip(*islice(inputs, len(step)), strict=True)) for step in of_epoch]
            yield torch.stack([self.step(*of_all) for of_all in steps]).mean(0)

    def _trained(self) -> list[torch.Tensor]:
        return list(self.stacked.values())

    def _generator(self, seed: int, key: tuple[tuple, ...], epoch: int) -> list[torch.Generator]:
        return [generator(seed, *of_net, "epoch", epoch) for of_net in key]

    def _losses(
        self, images: torch.Tensor, labels: torch.Tensor, weight: float, params: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Losses `[networks]` of images `[networks, n, C, H, W]`."""

        def one(images: torch.Tensor, labels: torch.Tensor, params: dict[str, torch.Tensor]) -> torch.Tensor:
            return joint_loss(functional_call(self.net, params, (images,)), labels, weight)

        return vmap(one)(images, labels, params)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Like `Trainer.step`; all tensors have a leading dimension of networks."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.loss(images, labels, self.settings.lambda_oe, self.stacked)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach().clone()
