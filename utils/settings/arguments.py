"""The flags of the scripts, in groups; those that only some methods use are in the files of `utils/methods`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from networks import MODEL_NAMES
from utils.compute.device import PRECISIONS
from utils.core.errors import UserError
from utils.data.augment import DSA_ENTRIES, parse_strategy
from utils.data.datasets import DATASET_NAMES, RealData, load_dataset
from utils.methods import METHODS
from utils.methods.method import add_method_choice, add_method_flags
from utils.ood.detectors import ALL_SCORES, DETECTORS
from utils.ood.scores import SCORES
from utils.runs.lineage import STAGE1_ROOTS, STAGE2_ROOTS
from utils.settings.outliers import add_oe, add_outlier_weight, add_outliers, add_poe
from utils.settings.parser import Parser, count, number, one_of
from utils.settings.training_set import add_training_set

OOD_PATH = "data/ood"
NUM_EVAL = 20  # networks of an evaluation in stage 1


def _strategy(text: str) -> str | None:
    if text in ("None", "none", ""):
        return None
    try:
        parse_strategy(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).split(": ", 1)[1]) from None
    return text


def add_common(parser: Parser) -> None:
    """Flags of every stage: the method, the data, the network, the seed and the device."""
    group = parser.add_argument_group("common")
    add_method_choice(parser, group, METHODS)
    add_data(group)
    add_network(group)
    group.add_argument("--ipc", type=count(1), default=1, help="synthetic images per class")


def passed_on(flags: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The flags that the next stage is given as they were: what names the run, and those of stage 1 and 2 that differ
    from their defaults in stage 1, out of these that all stages have and `names`.
    """
    parser = Parser()
    add_common(parser)
    add_training(parser, NUM_EVAL)
    add_compute(parser)
    add_outlier_weight(parser)
    known = ("data_path", "im_size", "pixel_max", "zca", "seed", "device", "compile", *names)
    changed = {n: flags[n] for n in known if n in flags and flags[n] != parser.get_default(n)}
    return {n: flags[n] for n in ("method", "method_file", "dataset", "model", "ipc")} | changed


def add_network(group: argparse._ArgumentGroup) -> None:
    """The network, the seed and the device."""
    group.add_argument(
        "--model",
        type=one_of("model", MODEL_NAMES),
        default="ConvNet",
        help=f"the network, one of {', '.join(MODEL_NAMES)}; ConvNetW32 suits a laptop",
    )
    group.add_argument("--seed", type=int, default=1, help="fixes everything random; change it for an independent run")
    group.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda or cuda:N")


def add_data(group: argparse._ArgumentGroup) -> None:
    """The data set, its folder, and what may be downloaded."""
    group.add_argument(
        "--dataset",
        type=one_of("dataset", DATASET_NAMES),
        default="CIFAR10",
        help=f"one of {', '.join(DATASET_NAMES)}; npz and ImageFolder read your own data",
    )
    group.add_argument(
        "--data_path",
        default="data",
        help="folder of the real data (with --dataset npz: the file); change it to share one copy between clones",
    )
    group.add_argument(
        "--download",
        choices=("none", "data", "all"),
        nargs="?",
        const="all",
        default="data",
        help="what may be downloaded when it is missing: nothing, the data set, or also outlier and OOD sets (large)",
    )
    group.add_argument(
        "--zca",
        action="store_true",
        help="whiten the images (ZCA, fitted on the training images) instead of normalising them; in all stages alike",
    )
    group.add_argument(
        "--im_size",
        type=count(1),
        default=None,
        help="side of the images with --dataset ImageFolder (64 when left out)",
    )
    group.add_argument(
        "--pixel_max",
        type=count(1),
        default=None,
        help="the value of white in images that use a small part of their type's range, e.g. 4095 for 12 bits in "
        "files of 16; also of outliers and OOD sets; needed only where a message asks for it",
    )


def read_data(args: argparse.Namespace) -> RealData:
    """The data set that the flags of `add_data` name, on the CPU."""
    download = args.download != "none"
    return load_dataset(args.dataset, args.data_path, args.im_size, download, args.zca, args.pixel_max)


def add_compute(parser: Parser, training: bool = True) -> None:
    """Flags of speed; results differ by rounding only. `training`: whether the script trains, or measures."""
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--compile",
        type=one_of("choice", ("auto", "on", "off")),
        default="auto",
        help="torch.compile; auto compiles a run that is expected to save more time than compiling takes",
    )
    runs = "network training and the real side of matching"
    if not training:
        runs = "the layers before the last (but not for scores of images, as odin)"
    group.add_argument(
        "--precision",
        type=one_of("precision", PRECISIONS),
        default="tf32" if training else "fp32",
        help=f"tf32 and fp32 differ on CUDA only; bf16 (where the processor has it) runs {runs} under autocast",
    )
    if not training:
        return
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits at every run on CUDA, but slower; on the CPU every run has the same bits anyway",
    )


def add_training(parser: Parser, num_eval: int) -> None:
    """Flags of network training on a synthetic set."""
    group = parser.add_argument_group("network training")
    group.add_argument(
        "--num_eval",
        type=count(1),
        default=num_eval,
        help="fresh networks per evaluation; fewer are faster, with more the mean is more reliable",
    )
    group.add_argument(
        "--epoch_eval_train",
        type=count(1),
        default=None,
        help="epochs of one training; left out: 1000 with augmentation, else 300. Lower it for a quick look",
    )
    group.add_argument(
        "--lr_net",
        type=number(0, exclusive=True),
        default=None,
        help="learning rate of the networks; left out: that of the distilled set if it has one (MTT), else 0.01",
    )
    group.add_argument(
        "--batch_train", type=count(1), default=256, help="batch of network training (of InD images, and of outliers)"
    )
    group.add_argument(
        "--dsa_strategy",
        type=_strategy,
        default=None,
        help=f"augmentation: names joined by _ out of {', '.join(DSA_ENTRIES)}; leave out flip for digits and letters",
    )


def add_stage1(parser: Parser, save_path: str) -> None:
    """All flags of a stage-1 script without outliers."""
    add_common(parser)
    add_training(parser, NUM_EVAL)
    add_compute(parser)
    group = parser.add_argument_group("distillation")
    _add_loop(group)
    _add_updates(group)
    _add_trust(group)
    group.add_argument("--save_path", default=save_path, help="run folders are made in this folder")
    group.add_argument(
        "--load_path",
        default=None,
        help="a res_….pt whose images (and outliers) are the start, instead of --init; continues with other flags",
    )
    add_method_flags(parser, parser.add_argument_group("methods"), METHODS)
    parser.completions.append(_refuse_unused_ood_path)


def _refuse_unused_ood_path(parser: Parser, args: argparse.Namespace, given: dict) -> tuple[argparse.Namespace, dict]:
    if "ood_path" in given and not args.eval_ood and not args.resume:
        parser.error("--ood_path: it is the folder of the sets of --eval_ood, which is not given")
    return args, given


def _add_loop(group: argparse._ArgumentGroup) -> None:
    """Flags of the loop: experiments, iterations, evaluations."""
    group.add_argument(
        "--eval_mode",
        type=one_of("evaluation mode", ("S", "SS", "M", "B", "W", "D", "A", "P", "N")),
        default="S",
        help="which networks evaluate: S the same without BatchNorm, SS exactly the same, M several "
        "architectures, B BatchNorm ones, W widths, D depths, A activations, P poolings, N norms",
    )
    group.add_argument("--num_exp", type=count(1), default=5, help="independent distillations")
    group.add_argument("--Iteration", type=count(0), default=1000, help="updates of the synthetic images")
    group.add_argument(
        "--eval_interval",
        type=count(1),
        default=500,
        help="updates between two evaluations; the last update is always evaluated",
    )


def _add_trust(group: argparse._ArgumentGroup) -> None:
    """Flags of OOD detection during evaluations, and of TensorBoard."""
    group.add_argument(
        "--eval_ood",
        nargs="+",
        default=None,
        metavar="SET",
        help="evaluations also report the AUROC (score msp) on these OOD sets: any of stage 3, e.g. patches gaussian",
    )
    group.add_argument("--ood_path", default=OOD_PATH, help="folder of the sets of --eval_ood")
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write TensorBoard events into the run folder (needs tensorboard)",
    )


def _add_updates(group: argparse._ArgumentGroup) -> None:
    """Flags of one update."""
    group.add_argument(
        "--lr_img", type=number(0, exclusive=True), default=0.1, help="learning rate of the synthetic images"
    )
    group.add_argument(
        "--batch_real", type=count(1), default=256, help="real images per class and step; lower it when memory is short"
    )
    group.add_argument(
        "--init",
        type=one_of("initialisation", ("noise", "real")),
        default="noise",
        help="noise or real images; real converges faster",
    )


def add_experts(parser: Parser) -> None:
    """All flags of `train_experts.py`."""
    group = parser.add_argument_group("common")
    add_data(group)
    add_network(group)
    group = parser.add_argument_group("experts")
    group.add_argument(
        "--num_experts",
        type=count(1),
        default=100,
        help="how many networks to train; the paper used 100, fewer work, too",
    )
    group.add_argument(
        "--train_epochs",
        type=count(1),
        default=50,
        help="epochs of each; at least --max_start_epoch + --expert_epochs - 1",
    )
    group.add_argument("--lr_teacher", type=number(0, exclusive=True), default=0.01, help="learning rate")
    group.add_argument("--mom", type=number(0), default=0.0, help="momentum")
    group.add_argument("--l2", type=number(0), default=0.0, help="weight decay")
    group.add_argument(
        "--decay", action="store_true", help="multiply the learning rate by 0.1 after epoch train_epochs // 2 + 1"
    )
    group.add_argument("--batch_train", type=count(1), default=256, help="images in a batch")
    group.add_argument(
        "--dsa_strategy", type=_strategy, default=None, help="augmentation; take that of the distillation"
    )
    group.add_argument("--buffer_path", default="buffers", help="the trajectories are written below this folder")
    group.add_argument(
        "--outliers",
        type=one_of("kind of outliers", ("none", "oe", "poe")),
        default="none",
        help="train on outliers, too: oe for main_oe.py, poe for main_poe.py",
    )
    add_outliers(parser, distilled=False)
    add_oe(parser)
    add_poe(parser)
    add_compute(parser)
    parser.completions.append(_refuse_other_outliers)


def _refuse_other_outliers(parser: Parser, args: argparse.Namespace, given: dict) -> tuple[argparse.Namespace, dict]:
    """Refuse flags of outliers that `--outliers` does not use, rather than ignore them."""
    both = ("batch_oe", "lambda_oe")
    used = {
        "none": (),
        "oe": (*both, "oe_data_path", "num_oe_per_class"),
        "poe": (*both, "corruptions", "mix_corruptions"),
    }
    for name in given:
        kinds = [kind for kind, names in used.items() if name in names]
        if kinds and args.outliers not in kinds:
            parser.error(f"--{name}: --outliers {args.outliers} does not use it; give --outliers {' or '.join(kinds)}")
    return args, given


def add_stage2(parser: Parser, save_path: str) -> None:
    """All flags of a stage-2 script without outliers."""
    add_common(parser)
    add_training(parser, num_eval=5)
    add_compute(parser)
    add_folder(parser, save_path, STAGE1_ROOTS)
    parser.add_argument("--exp_idx", type=count(0), default=0, help="which experiment of the distilled set to train on")
    add_training_set(parser)


def add_stage3(parser: Parser) -> None:
    """All flags of the stage-3 script."""
    add_common(parser)
    add_compute(parser, training=False)
    add_folder(parser, "result-test-ood-synthetic", STAGE2_ROOTS)
    group = parser.add_argument_group("test")
    group.add_argument(
        "--batch_test", type=count(1), default=256, help="images per forward pass; lower it when memory is short"
    )
    group.add_argument("--num_exp", type=count(1), default=5, help="how many of the trained networks to test")
    group.add_argument(
        "--is_load_best", action="store_true", help="test the best checkpoints instead of those of --epoch_train"
    )
    group.add_argument(
        "--epoch_train",
        type=count(1),
        default=None,
        help="which epoch's checkpoints to test; left out: the last that the networks have; --is_load_best tests the "
        "best instead",
    )
    _add_ood_sets(parser.add_argument_group("OOD sets"))
    _add_scores(parser.add_argument_group("scores"))


def _add_ood_sets(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ood_path",
        default=OOD_PATH,
        help="folder of OOD sets: <name>/ (images), <name>.npz (key images) or <name>.npy; and of the images in a list",
    )
    group.add_argument(
        "--ood_sets",
        nargs="+",
        default=None,
        help="which sets, in order; left out: those of the paper. Names (gaussian uniform rademacher blob patches need "
        "no files), or paths: a folder, .npz, .npy, or a list (.txt, `path label` a line, as OpenOOD's)",
    )
    group.add_argument(
        "--skip_missing", action="store_true", help="test without the sets that are missing; the table names them"
    )
    group.add_argument(
        "--num_ood_ratio",
        type=count(1),
        default=1,
        help="N: use a fraction 1/N of as many OOD images as there are test images; 10 for a quick look",
    )
    group.add_argument(
        "-v", "--validate", action="store_true", help="also test on validation outliers, for choosing hyperparameters"
    )


def _add_scores(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--score",
        nargs="+",
        type=one_of("score", ALL_SCORES),
        default=None,
        help=f"msp when left out; one or more of {', '.join(SCORES)}; or, with the package pytorch-ood, "
        f"of {', '.join(DETECTORS)}. Scores "
        "of logits or features share one forward pass; odin, mahalanobis_odin and the grad ones need their own",
    )
    group.add_argument(
        "--fit_on",
        type=one_of("fitting set", ("distilled", "real")),
        default=None,
        help="what detectors are fitted on: the distilled set of these networks, or the real training set; left out: "
        "the set that they were trained on. knn, mahalanobis and the like need more images than a small ipc has",
    )
    group.add_argument("--T", type=number(0, exclusive=True), default=1.0, help="temperature of --score energy")
    group.add_argument("-x", "--use_xent", action="store_true", help="adds xent to --score")


def add_folder(parser: Parser, save_path: str, searched: Sequence[str]) -> None:
    """Flags by which stages 2 and 3 find what the stage before wrote."""
    group = parser.add_argument_group("files")
    group.add_argument(
        "--folder",
        default=None,
        help="name of the run folder to read; left out: the newest finished one that matches the other flags",
    )
    group.add_argument(
        "--load_path", default=None, help=f"root folder in which --folder is searched; left out: {', '.join(searched)}"
    )
    group.add_argument("--is_load_oe", action="store_true", help="search only runs with outliers (OE, POE)")
    group.add_argument("--save_path", default=save_path, help="run folders are made in this folder")
