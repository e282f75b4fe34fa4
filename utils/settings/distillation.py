"""Settings of stage 1 that do not belong to one method."""

from dataclasses import dataclass
from typing import ClassVar

from utils.data.datasets import RealData
from utils.outliers.sources import OutlierSource, PseudoOutliers, load_outlier_pool
from utils.runs.resume import Checkpoints
from utils.settings import common
from utils.settings.fields import Need, Settings, flag, flags_of, main_flag, only
from utils.settings.parser import count, number

EVAL_MODES = {  # the networks of --eval_mode, but for S and SS, which take that of --model
    "M": ("MLP", "ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18"),
    "B": ("ConvNetBN", "ConvNetASwishBN", "AlexNetBN", "VGG11BN", "ResNet18BN"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
}
WITH_OUTLIERS = Need(
    lambda s: s.outliers != "none",
    "main.py distils no outliers; leave it out, or use main_oe.py or main_poe.py",
    of_script=True,
)


@dataclass(frozen=True)
class DistilledOutliers(Settings):
    """Distilled outliers."""

    lr_img_oe: float | None = flag(
        None,
        "learning rate of the synthetic outliers; left out: --lr_img. Lower it if they become noise",
        number(0, exclusive=True),
    )
    init_oe: str = flag(
        "random",
        "which outliers --init real starts from: random ones, or kcenter: far apart in the features of a network "
        "trained on the initial images, out of 10000",
        names=("random", "kcenter"),
    )
    clamp_oe: bool = flag(False, "keep the outliers in the range of pixels, after each update")


@dataclass(frozen=True)
class Distilling(
    common.TrainsNetworks,
    common.Writes,
    common.OutlierBatches,
    DistilledOutliers,
    common.OutlierTraining,
    common.Pool,
    common.Corrupted,
    Checkpoints,
):
    """Distillation. What every method finds in its settings; its own settings are a subclass that adds its flags."""

    NEEDS: ClassVar = {
        common.OutlierBatches: WITH_OUTLIERS,
        DistilledOutliers: WITH_OUTLIERS,
        common.OutlierTraining: WITH_OUTLIERS,
        common.Pool: Need(
            lambda s: s.outliers == "oe", "only main_oe.py takes outliers from a pool; leave it out", True
        ),
        common.Corrupted: Need(
            lambda s: s.outliers == "poe", "only main_poe.py corrupts training images; leave it out", True
        ),
    }

    eval_mode: str = flag(
        "S",
        "which networks evaluate: S the same without BatchNorm, SS exactly the same, M several architectures, B "
        "BatchNorm ones, W widths, D depths, A activations, P poolings, N norms",
        names=("S", "SS", *EVAL_MODES),
    )
    num_exp: int = main_flag(5, "independent distillations")
    Iteration: int = main_flag(1000, "updates of the synthetic images", count(0))
    eval_interval: int = flag(
        500,
        "updates between two evaluations; the last update is always evaluated",
        needs=Need(
            lambda s: not s.evaluates_only_the_last,
            "--eval_mode {eval_mode} evaluates the last update only; leave it out, or take --eval_mode S",
        ),
    )
    lr_img: float = flag(0.1, "learning rate of the synthetic images", number(0, exclusive=True))
    batch_real: int = flag(256, "real images per class and step; lower it when memory is short")
    init: str = main_flag("noise", "noise or real images; real converges faster", names=("noise", "real"))
    eval_ood: tuple[str, ...] | None = flag(
        None,
        "evaluations also report the AUROC (score msp) on these OOD sets: any of stage 3, e.g. patches gaussian",
        metavar="SET",
    )
    ood_path: str = flag(common.OOD_PATH, "folder of the sets of --eval_ood", may_change=True, needs=only("eval_ood"))
    tensorboard: bool = flag(
        False, "also write TensorBoard events into the run folder (needs tensorboard)", may_change=True
    )
    load_path: str | None = flag(
        None,
        "a res_….pt whose images (and outliers) are the start, instead of --init; continues with other flags",
        may_change=True,
    )
    outliers: str = "none"  # the script decides it: none, oe or poe

    @property
    def evaluates_only_the_last(self) -> bool:
        """Whether only the last update is evaluated, since the modes with several networks take long."""
        return self.eval_mode in EVAL_MODES

    @property
    def decoded_ipc(self) -> int:
        """Images per class that networks see."""
        return self.ipc * self.factor**2


@dataclass(frozen=True)
class Buffers(Settings):
    """Experts on disk."""

    buffer_path: str = main_flag(
        "buffers", "folder of the trajectories of experts that train_experts.py writes", may_change=True
    )


@dataclass(frozen=True)
class ExpertSettings(
    common.Data,
    common.Network,
    common.Batches,
    Buffers,
    common.Speed,
    common.OutlierBatches,
    common.OutlierTraining,
    common.Pool,
    common.Corrupted,
):
    """Experts. How they are trained."""

    NEEDS: ClassVar = {
        common.OutlierBatches: only("outliers", "oe", "poe"),
        common.OutlierTraining: only("outliers", "oe", "poe"),
        common.Pool: only("outliers", "oe"),
        common.Corrupted: only("outliers", "poe"),
    }

    num_experts: int = main_flag(100, "how many networks to train; the paper used 100, fewer work, too")
    train_epochs: int = main_flag(50, "epochs of each; at least --max_start_epoch + --expert_epochs - 1")
    lr_teacher: float = main_flag(0.01, "learning rate", number(0, exclusive=True))
    mom: float = main_flag(0.0, "momentum")
    l2: float = flag(0.0, "weight decay")
    decay: bool = flag(False, "multiply the learning rate by 0.1 after epoch train_epochs // 2 + 1")
    outliers: str = main_flag(
        "none", "train on outliers, too: oe for main_oe.py, poe for main_poe.py", names=("none", "oe", "poe")
    )

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


@dataclass(frozen=True)
class OnExperts(Distilling, Buffers):
    """Matching with experts."""

    TOO_SHORT: ClassVar = "--buffer_path: the experts in {experts.folder} have a single snapshot; train them again"

    expert_lambda_oe: float | None = flag(
        None,
        "weight of the outlier loss when the experts were trained; left out: --lambda_oe. With a larger one, training "
        "on the distilled outliers at --lambda_oe acts like training at this weight",
        number(0),
        needs=WITH_OUTLIERS,
    )
    train_experts: str = flag(
        "never",
        "auto: first train the experts that are missing, as train_experts.py would with its defaults for this method",
        names=("never", "auto"),
        may_change=True,
    )
    max_experts: int | None = flag(
        None, "use only this many experts, the first ones, and train no more; left out: all", count(1)
    )

    @property
    def last_epoch(self) -> int:
        """The last epoch of the experts that is needed; `TOO_SHORT` is the message if they end before."""
        return 1

    def to_train(self) -> ExpertSettings | None:
        """The experts that stage 1 is to train first, if the settings say so."""
        return self.of_experts() if self.train_experts == "auto" else None

    def of_experts(self) -> ExpertSettings:
        """The settings of `train_experts.py` for experts that fit."""
        c = common
        groups = (c.Data, c.Network, Buffers, c.OutlierTraining, c.Pool, c.Corrupted, c.Speed)
        shared = {f.name: getattr(self, f.name) for group in groups for f in flags_of(group)}
        if self.expert_lambda_oe is not None:
            shared["lambda_oe"] = self.expert_lambda_oe
        epochs = max(self.last_epoch, ExpertSettings.train_epochs)
        own = {"outliers": self.outliers, "train_epochs": epochs, "dsa_strategy": self.dsa_strategy}
        own |= {} if self.max_experts is None else {"num_experts": self.max_experts}
        return ExpertSettings(**shared | own)


def source_of(s: Distilling | ExpertSettings, real: RealData) -> OutlierSource | None:
    """The source of outliers of a distillation, or of experts; None without outliers."""
    if s.outliers == "oe":
        return load_outlier_pool(s.oe_data_path, real, s.num_oe_per_class, s.seed, s.download == "all")
    return PseudoOutliers(real, s.corruptions, s.mix_corruptions) if s.outliers == "poe" else None
