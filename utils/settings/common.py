"""Settings that several scripts have: the data, the network, how it computes, network training, OOD sets."""

from dataclasses import dataclass

from networks import MODEL_NAMES
from utils.compute import distributed
from utils.compute.device import PRECISIONS
from utils.core.errors import require
from utils.data.augment import DSA, DSA_ENTRIES
from utils.data.datasets import DATASET_NAMES, RealData, load_dataset
from utils.ood.scores import ALL_SCORES, DETECTORS, SCORES
from utils.outliers.corruptions import CORRUPTIONS, DEFAULT_CORRUPTIONS
from utils.settings.fields import Settings, flag, main_flag
from utils.settings.parser import number, one_of
from utils.training.trainer import LEARNING_RATES, MIXES, PROTOCOLS, SCHEDULES

OOD_PATH = "data/ood"


def strategy(text: str) -> str | None:
    """A DSA strategy, or None for `None`; the check of `--dsa_strategy`."""
    if text in ("None", "none", ""):
        return None
    return "_".join(map(one_of("entry", DSA_ENTRIES), text.split("_")))


@dataclass(frozen=True)
class Data(Settings):
    """Data."""

    dataset: str = main_flag(
        "CIFAR10",
        f"one of {', '.join(DATASET_NAMES)}; npz and ImageFolder read your own data",
        one_of("dataset", DATASET_NAMES),
    )
    data_path: str = main_flag(
        "data",
        "folder of the real data (with --dataset npz: the file); change it to share one copy between clones",
        may_change=True,
    )
    download: str = flag(
        "data",
        "what may be downloaded when it is missing: nothing, the data set, or also outlier and OOD sets (large)",
        names=("none", "data", "all"),
        nargs="?",
        const="all",
        may_change=True,
    )
    zca: bool = flag(
        False, "whiten the images (ZCA, fitted on the training images) instead of normalising them; in all stages alike"
    )
    im_size: int | None = flag(None, "side of the images with --dataset ImageFolder (64 when left out)")
    pixel_max: int | None = flag(
        None,
        "the value of white in images that use a part of their type's range: 4095 for 12 bits in files of 16 (a "
        "message asks for it), 16383 for 14; also of outliers and OOD sets",
    )


def read_data(s: Data) -> RealData:
    """The data set that the settings name, on the CPU; all processes must have read the same."""
    real = load_dataset(s.dataset, s.data_path, s.im_size, s.download != "none", s.zca, s.pixel_max)
    if distributed.world_size() > 1:
        prints = {*distributed.gather({distributed.rank(): real.fingerprint()}).values()}
        told = f"--data_path {s.data_path}: processes have read different data; give all the same files and Pillow"
        require(len(prints) == 1, told)
    return real


@dataclass(frozen=True)
class Network(Settings):
    """Network."""

    model: str = main_flag(
        "ConvNet",
        "the network: ConvNet or a variant (D1 to D4, W32 to W256, AS AR AL ASwish, NN BN LN IN GN, NP MP AP), MLP, "
        "LeNet, AlexNet, VGG11 to VGG19, ResNet18 to ResNet152; ConvNetW32 suits a laptop",
        one_of("model", MODEL_NAMES),
    )
    seed: int = flag(1, "fixes everything random; change it for an independent run", int)
    device: str = flag("auto", "auto (CUDA where there is one), cpu, cuda or cuda:N", may_change=True)


@dataclass(frozen=True)
class Images(Settings):
    """Synthetic images."""

    ipc: int | None = main_flag(1, "synthetic images per class")
    factor: int = main_flag(
        1,
        "each stored image holds factor x factor smaller ones, which are enlarged: networks train on factor² times "
        "--ipc images per class; too much for images of 8x8",
    )


@dataclass(frozen=True)
class Speed(Settings):
    """Speed. Results differ by rounding only."""

    compile: str = flag(
        "auto",
        "torch.compile; auto compiles a run that is expected to save more time than compiling takes",
        names=("auto", "on", "off"),
    )
    precision: str = flag(
        "tf32",
        "tf32 and fp32 differ on CUDA only; bf16 (where the processor has it) runs network training and the real side "
        "of matching (of TGDD all of it) under autocast; in stage 3 the layers before the last, but not for scores of "
        "images, as odin",
        names=PRECISIONS,
    )
    deterministic: bool = flag(
        False, "the same bits at every run on CUDA, but slower; on the CPU every run has the same bits anyway"
    )


@dataclass(frozen=True)
class Batches(Settings):
    """Training batches."""

    batch_train: int | None = flag(
        None,
        "batch of network training (of InD images, and of outliers); left out: 256, or in evaluation and stage 2 that "
        "of --protocol",
    )
    dsa_strategy: str | None = main_flag(
        None,
        f"augmentation: names joined by _ out of {', '.join(DSA_ENTRIES)}; leave out flip for digits and letters; the "
        "same in all stages",
        strategy,
    )

    @property
    def batch(self) -> int:
        """The batch where no protocol says it."""
        return self.batch_train or 256

    @property
    def augmentation(self) -> DSA | None:
        """The augmentation of the strategy, if there is one."""
        return None if self.dsa_strategy is None else DSA.of(self.dsa_strategy)


@dataclass(frozen=True)
class Training(Settings):
    """Network training on a synthetic set."""

    protocol: str = main_flag(
        "dc", "training as in DC to MTT (dc), IDC or NCFM; other flags overrule it", names=tuple(PROTOCOLS)
    )
    optimizer: str | None = flag(None, "left out: by --protocol", names=tuple(LEARNING_RATES))
    schedule: str | None = flag(
        None,
        "how the learning rate falls: half, to a tenth at half time; late, to a fifth twice; fifths, to a half four "
        "times; left out: by --protocol",
        names=tuple(SCHEDULES),
    )
    mix: str | None = flag(
        None,
        "mix images of a batch, not outliers, and their labels; cutmix drops cutout from the augmentation; left out: "
        "by --protocol",
        names=MIXES,
    )
    num_eval: int = main_flag(
        20, "fresh networks per evaluation; fewer are faster, with more the mean is more reliable"
    )
    epoch_eval_train: int | None = main_flag(
        None,
        "epochs of one training; left out: by --protocol, 1000 with dc, or 300 without augmentation. Lower it for a "
        "quick look",
    )
    lr_net: float | None = flag(
        None,
        "learning rate of the networks; left out: for sgd that of the distilled set if it has one (MTT), else 0.01; "
        "for adamw 0.001",
        number(0, exclusive=True),
    )

    @property
    def tests_best(self) -> bool:
        """Whether the best checkpoints are tested, as DC published it; of the other protocols it is the last epoch."""
        return self.protocol == "dc"


@dataclass(frozen=True)
class TrainsNetworks(Data, Network, Images, Training, Batches, Speed):
    """What stages 1 and 2 have in common."""


@dataclass(frozen=True)
class Reads(Settings):
    """What the stage before wrote."""

    folder: str | None = main_flag(
        None,
        "name of the run folder to read; left out: the newest finished one that matches the other flags",
        may_change=True,
    )
    load_path: str | None = main_flag(
        None,
        "root folder in which --folder is searched; left out: those that the stage before writes to",
        may_change=True,
    )
    is_load_oe: bool = main_flag(False, "search only runs with outliers (OE, POE)")


@dataclass(frozen=True)
class Writes(Settings):
    """Where this stage writes."""

    save_path: str = main_flag("result", "run folders are made in this folder")


@dataclass(frozen=True)
class OutlierTraining(Settings):
    """Outliers in network training."""

    lambda_oe: float = main_flag(0.5, "weight of the outlier loss in network training; at 0 it counts nothing")


@dataclass(frozen=True)
class OutlierBatches(Settings):
    """Outliers in batches."""

    batch_oe: int = flag(256, "outliers per slot and step; of experts, per step, of all slots together")


@dataclass(frozen=True)
class Pool(Settings):
    """Outlier exposure."""

    oe_data_path: str | None = main_flag(
        "data/300K_random_images.npy",
        "the pool of real outliers: .npy (uint8 NHWC), .npz (key images), or a folder of images; without one, stage 2 "
        "corrupts training images",
        may_change=True,
    )
    num_oe_per_class: int = flag(10000, "outliers of the pool for each class slot; fewer if the pool is too small")


@dataclass(frozen=True)
class Corrupted(Settings):
    """Pseudo-outlier exposure."""

    corruptions: tuple[str, ...] = main_flag(
        DEFAULT_CORRUPTIONS,
        f"how POE outliers are made, out of {', '.join(CORRUPTIONS)}: class 0 uses the first, class 1 the second, "
        "and so on, from the first again after the last",
        one_of("corruption", CORRUPTIONS),
    )
    mix_corruptions: bool = flag(
        False, "draw the corruption of each POE outlier out of --corruptions, instead of one for each class"
    )


@dataclass(frozen=True)
class OODSets(Settings):
    """OOD sets."""

    ood_path: str = main_flag(
        OOD_PATH,
        "folder of OOD sets: <name>/ (images), <name>.npz (key images) or <name>.npy; and of the images in a list",
    )
    ood_sets: tuple[str, ...] | None = main_flag(
        None,
        "which sets, in order; left out: those of the paper. Names (gaussian uniform rademacher blob patches need no "
        "files), or paths: a folder, .npz, .npy, or a list (.txt, `path label` a line, as OpenOOD's)",
    )
    skip_missing: bool = flag(False, "test without the sets that are missing; the table names them")
    num_ood_ratio: int = flag(
        1, "N: use a fraction 1/N of as many OOD images as there are test images; 10 for a quick look"
    )
    validate: bool = flag(False, "also test on validation outliers, for choosing hyperparameters", short="-v")


@dataclass(frozen=True)
class Scores(Settings):
    """Scores."""

    score: tuple[str, ...] | None = main_flag(
        None,
        f"msp when left out; one or more of {', '.join(SCORES)}; or, with the package pytorch-ood, of "
        f"{', '.join(DETECTORS)}. Scores of logits or features share one forward pass; odin, mahalanobis_odin and the "
        "grad ones need their own",
        one_of("score", ALL_SCORES),
    )
    fit_on: str | None = flag(
        None,
        "what detectors are fitted on: the distilled set of these networks, or the real training set; left out: the "
        "set that they were trained on. knn, mahalanobis and the like gain from the many images of the real one",
        names=("distilled", "real"),
    )
    T: float = flag(1.0, "temperature of --score energy", number(0, exclusive=True))
    use_xent: bool = flag(False, "adds xent to --score", short="-x")
