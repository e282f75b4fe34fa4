"""Settings of stage 3."""

from dataclasses import dataclass

from utils.ood.scores import ALL_SCORES, DETECTORS, SCORES
from utils.settings.distillation import OOD_PATH
from utils.settings.fields import Settings, flag, main_flag
from utils.settings.parser import number, one_of


@dataclass(frozen=True)
class Test(Settings):
    """Test."""

    batch_test: int = flag(256, "images per forward pass; lower it when memory is short")
    num_exp: int = main_flag(5, "how many of the trained networks to test")
    is_load_best: bool = main_flag(False, "test the best checkpoints instead of those of --epoch_train")
    epoch_train: int | None = flag(
        None,
        "which epoch's checkpoints to test; left out: the last that the networks have; --is_load_best tests the best "
        "instead",
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
        "set that they were trained on. knn, mahalanobis and the like need more images than a small ipc has",
        names=("distilled", "real"),
    )
    T: float = flag(1.0, "temperature of --score energy", number(0, exclusive=True))
    use_xent: bool = flag(False, "adds xent to --score", short="-x")
