"""Settings of `train_experts.py`."""

from dataclasses import dataclass
from typing import ClassVar

from utils.settings.common import Batches, Data, Determinism, Network, Speed
from utils.settings.fields import Need, Settings, flag
from utils.settings.outliers import Corrupted, OutlierBatches, OutlierTraining, Pool
from utils.settings.parser import count, number, one_of

KINDS = ("none", "oe", "poe")
NEED = "--outliers {outliers} does not use it; give --outliers "


@dataclass(frozen=True)
class Buffers(Settings):
    """Experts on disk."""

    buffer_path: str = flag(
        "buffers", "folder of the trajectories of experts that train_experts.py writes", often=True, may_change=True
    )


@dataclass(frozen=True)
class Experts(Settings):
    """Experts."""

    num_experts: int = flag(
        100, "how many networks to train; the paper used 100, fewer work, too", count(1), often=True
    )
    train_epochs: int = flag(
        50, "epochs of each; at least --max_start_epoch + --expert_epochs - 1", count(1), often=True
    )
    lr_teacher: float = flag(0.01, "learning rate", number(0, exclusive=True), often=True)
    mom: float = flag(0.0, "momentum", number(0), often=True)
    l2: float = flag(0.0, "weight decay", number(0))
    decay: bool = flag(False, "multiply the learning rate by 0.1 after epoch train_epochs // 2 + 1")
    outliers: str = flag(
        "none",
        "train on outliers, too: oe for main_oe.py, poe for main_poe.py",
        one_of("kind of outliers", KINDS),
        names=KINDS,
        often=True,
    )


@dataclass(frozen=True)
class ExpertSettings(
    Data, Network, Experts, Batches, Buffers, Speed, Determinism, OutlierBatches, OutlierTraining, Pool, Corrupted
):
    """How experts are trained."""

    NEEDS: ClassVar = {
        OutlierBatches: (Need(lambda s: s.outliers != "none", NEED + "oe or poe"),),
        OutlierTraining: (Need(lambda s: s.outliers != "none", NEED + "oe or poe"),),
        Pool: (Need(lambda s: s.outliers == "oe", NEED + "oe"),),
        Corrupted: (Need(lambda s: s.outliers == "poe", NEED + "poe"),),
    }

    def about(self) -> dict:
        """Plain values for `experts.json`; they must be the same in all runs that train experts in one folder."""
        return {
            "epochs": self.train_epochs,
            "lr": self.lr_teacher,
            "momentum": self.mom,
            "weight_decay": self.l2,
            "decay": self.decay,
            "batch": self.batch,
            "batch_oe": self.batch_oe,
            "lambda_oe": self.lambda_oe,
            "seed": self.seed,
            "augmentation": None if self.dsa_strategy is None else self.dsa_strategy.split("_"),
        }
