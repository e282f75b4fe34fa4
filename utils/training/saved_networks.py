"""The checkpoints of trained networks that stage 2 writes and stage 3 reads: their names, writing and loading them."""

from pathlib import Path

import torch
from torch import nn

from utils.core.errors import UserError, blame, one_line, require
from utils.core.files import save_pt
from utils.core.rng import generator
from utils.core.torch_files import read_pt
from utils.data.datasets import RealData
from utils.training.trainer import TEST_BATCH, predict

CHECKPOINT_INTERVAL = 200


def checkpoint_name(dataset: str, model: str, index: int | str, which: str) -> str:
    """File name of network `index`; `which` is `best` or `epoch<e>`."""
    return f"syn_trained_{dataset}_{model}_exp{index}_{which}.pt"


def checkpoints_of(folder: Path, dataset: str, model: str) -> dict[int, set[str]]:
    """What a stage-2 folder keeps of each network, by its index: `best`, `epoch<e>`."""
    kept: dict[int, set[str]] = {}
    for path in folder.glob(checkpoint_name(dataset, model, "*", "*")):
        index, _, which = path.stem.rpartition("_exp")[2].partition("_")
        if index.isdecimal() and path.is_file():
            kept.setdefault(int(index), set()).add(which)
    return kept


def epochs_of(kept: set[str]) -> list[int]:
    """The epochs of the checkpoints of a network, sorted."""
    return sorted(int(which[5:]) for which in kept if which.startswith("epoch") and which[5:].isdecimal())


def is_checkpoint_epoch(epoch: int, epochs: int) -> bool:
    """Whether `epoch` (1 … epochs) is kept: the last, and multiples of 200 from three fifths of `epochs` on."""
    return epoch == epochs or (epoch % CHECKPOINT_INTERVAL == 0 and 5 * epoch >= 3 * epochs)


def save_network(path: Path, net: nn.Module) -> None:
    """Write the weights for `load_network`."""
    save_pt(path, {name: tensor.cpu() for name, tensor in net.state_dict().items()})


def load_trained(folder: Path, model: str, real: RealData, index: int, which: str) -> nn.Module:
    """Network `index` of a stage-2 folder, see `load_network`."""
    return load_network(folder / checkpoint_name(real.name, model, index, which), model, real, "--folder")


def load_network(path: Path, model: str, real: RealData, flag: str) -> nn.Module:
    """The network of a state dict that stage 2 wrote, on the device of `real`, in evaluation mode.

    A `UserError`, which `flag` begins, tells of a file that is missing, damaged, or of another network or data set.
    """
    net = real.network(model, generator(0))
    with blame(flag):
        state = read_pt(path)
        is_plain = isinstance(state, dict) and all(isinstance(k, str) for k in state)
        is_plain = is_plain and all(isinstance(v, torch.Tensor) and not v.is_complex() for v in state.values())
        require(is_plain, f"{path} is no state dict; give what stage 2 wrote")
        try:
            net.load_state_dict(dict(state))  # a copy, without the version metadata that a file may attach
        except RuntimeError as error:
            raise UserError(f"{path} does not fit --model {model}: {one_line(error)}") from None
        net = net.to(real.device).eval()
        is_finite = torch.isfinite(predict(net, real.test_images[:TEST_BATCH])).all()
        require(is_finite, f"{path} holds NaN, or weights so large that its outputs are not finite; train it again")
    return net
