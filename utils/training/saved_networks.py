"""The checkpoints of trained networks that stage 2 writes and stage 3 reads: their names, and loading them."""

from pathlib import Path

import torch
from torch import nn

from utils.core.errors import UserError, one_line
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


def load_trained(folder: Path, model: str, real: RealData, index: int, which: str) -> nn.Module:
    """Network `index` of a stage-2 folder, on the device of `real`, in evaluation mode.

    Raises:
        UserError: when the checkpoint is missing, damaged, or of another network or data set.
    """
    return load_network(folder / checkpoint_name(real.name, model, index, which), model, real, "--folder")


def load_network(path: Path, model: str, real: RealData, flag: str) -> nn.Module:
    """The network of a state dict that stage 2 wrote, on the device of `real`, in evaluation mode.

    Args:
        flag: begins messages.
    Raises:
        UserError: when the file is missing, damaged, or of another network or data set.
    """
    state = read_pt(path, flag)
    net = real.network(model, generator(0))
    plain = isinstance(state, dict) and all(isinstance(k, str) for k in state)
    if not plain or not all(isinstance(v, torch.Tensor) and not v.is_complex() for v in state.values()):
        raise UserError(f"{flag}: {path} is no state dict; give what stage 2 wrote")
    try:
        net.load_state_dict(dict(state))  # a copy, without the version metadata that a file may attach
    except RuntimeError as error:
        reason = one_line(error)
        raise UserError(f"{flag}: {path} does not fit --model {model}: {reason}") from None
    if not all(torch.isfinite(v).all() for v in net.state_dict().values()):
        raise UserError(f"{flag}: {path} holds NaN or infinite weights; train it again")
    net = net.to(real.device).eval()
    if not torch.isfinite(predict(net, real.test_images[:TEST_BATCH])).all():
        raise UserError(f"{flag}: {path} holds weights so large that its outputs are not finite; train it again")
    return net
