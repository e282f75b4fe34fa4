"""Networks that are trained on the synthetic set while it is distilled, to match on instead of random ones.

The idea is that of a model pool (Zhao et al., *Improved Distribution Matching*, CVPR 2023): what a network has learned
shows in its gradients and features, but a single network would be followed too closely.
"""

from dataclasses import dataclass

import torch

from networks import initialize
from utils.compute import distributed
from utils.compute.device import Compute
from utils.core.rng import generator
from utils.data.datasets import RealData
from utils.data.synthetic import SyntheticSet
from utils.training.trainer import Trainer, TrainSettings


@dataclass
class NetworkPool:
    """Networks of one architecture and different ages, which take turns."""

    real: RealData
    model: str
    size: int  # how many there are
    epochs: int  # for which a network trains before each of its turns
    last_epoch: int  # a network that has trained for so many is replaced
    training: TrainSettings  # the learning rate stays as it is
    seed: int
    compute: Compute

    def __post_init__(self):
        self.net = self.real.network(self.model, generator(self.seed)).to(self.real.device)
        self.trainer = Trainer(self.net, self.training, self.compute)
        self.clear()

    def clear(self) -> None:
        """Forget all networks; each is made at its next turn."""
        self.states: list[dict[str, torch.Tensor] | None] = [None] * self.size
        self.ages = [0] * self.size

    def next_network(self, exp: int, it: int, synthetic: SyntheticSet) -> dict[str, torch.Tensor]:
        """The state of the network whose turn it is at iteration `it`, trained further on the synthetic set.

        At its first turn a network also gets a head start, so that the networks are of different ages. Rank 0 trains;
        the others receive the weights.
        """
        turn = it % self.size
        epochs, state = self.epochs, self.states[turn]
        if state is None:
            epochs += turn * self.last_epoch // self.size
        if state is None or self.ages[turn] >= self.last_epoch:
            initialize(self.net, generator(self.seed, "pool", exp, it))
            self.ages[turn] = 0
        else:
            self.net.load_state_dict(state)
        self.trainer.restart(self.training.learning_rate())
        if distributed.is_main():
            keys = [generator(self.seed, "pool", exp, it, epoch) for epoch in range(epochs)]
            for _ in self.trainer.drawn_epochs(synthetic, keys):
                pass
        tensors = {name: t.detach() for name, t in self.net.state_dict().items()}
        distributed.broadcast_(*tensors.values())
        self.ages[turn] += epochs
        self.states[turn] = {name: t.clone() for name, t in tensors.items()}
        return self.states[turn]

    def state_dict(self) -> dict:
        """The networks and their ages; later turns do not change these tensors."""
        return {"networks": list(self.states), "ages": list(self.ages)}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`; a `ValueError` tells that it has another number of networks."""
        if not len(state["networks"]) == len(state["ages"]) == self.size:
            raise ValueError(f"{len(state['networks'])} networks instead of {self.size}")
        device = self.real.device
        self.states = [n and {name: t.to(device).clone() for name, t in n.items()} for n in state["networks"]]
        self.ages = list(state["ages"])
