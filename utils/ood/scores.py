"""All scores behind one interface: those of logits, written here, and the detectors of the optional pytorch-ood.

Higher means more out-of-distribution. Of pytorch-ood are left out the detectors that need more than a classifier and a
labelled set: a choice of layers (Gram, MultiMahalanobis, NACUE), dropout (MCD), text (MCM), trained weights
(WeightedEBO).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils.compute.version import require_pytorch_ood
from utils.core.errors import require
from utils.ood.measures import best_temperature

GRADIENT_BATCH = 32  # per-image gradients need this many copies of the parameters


def msp(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Minus the maximum softmax probability (Hendrycks & Gimpel, ICLR 2017). `[N, K]` to `[N]`."""
    return -logits.softmax(1).amax(1)


def mls(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Minus the maximum logit (Hendrycks et al., ICML 2022)."""
    return -logits.amax(1)


def energy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`-T·logsumexp(z/T)` (Liu et al., NeurIPS 2020, eq. 4)."""
    return -temperature * (logits / temperature).logsumexp(1)


def xent(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`mean_k z - logsumexp z`, the negative cross-entropy to uniform (Hendrycks et al., ICLR 2019); at most -log K."""
    return logits.mean(1) - logits.logsumexp(1)


SCORES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {f.__name__: f for f in (msp, mls, energy, xent)}


@dataclass
class Model:
    """What scores are built from; what stands below `embed` is known once there is a set to fit on."""

    net: nn.Module
    temperature: float  # of energy
    std: tuple[float, ...]  # by which images were divided
    head_name: str | None = None  # the last layer; None where it is not known, and no score takes more than logits
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None  # images to what enters that layer
    num_classes: int = 0
    num_fit: int = 0  # images that scores are fitted on
    map_shape: tuple[int, int, int] | None = None  # (C, H, W) of the map that is flattened into features

    @property
    def head(self) -> nn.Linear:
        return self.net.get_submodule(self.head_name)

    def neighbours(self, most: int) -> int:
        """At most the mean number of images per class: more neighbours would have to come from other classes."""
        return min(most, max(1, self.num_fit // self.num_classes))

    def head_of_maps(self, maps: torch.Tensor) -> torch.Tensor:
        return self.head(maps.flatten(1).to(self.head.weight.device))  # VRA passes its maps on the CPU

    def head_of_large_maps(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """RankFeat looks at the singular values of a feature map."""
        channels, height, width = self.map_shape
        require(
            height * width > 1,
            f"--score rankfeat: takes a feature map of more than one pixel; {type(self.net).__name__} ends in "
            f"{channels} features without one. Leave it out or choose another --model",
        )
        return self.head_of_maps

    def is_weight_of_head(self, parameter: str) -> bool:
        return parameter == f"{self.head_name}.weight"

    def weights(self) -> dict[str, Any]:
        return {"w": self.head.weight, "b": self.head.bias}

    def half_of_spanned(self) -> int:
        """Half of the dimensions that the fitting set spans, so that the residual of ViM does not vanish on it."""
        return max(1, min(self.head.in_features, max(1, self.num_fit)) // 2)


class Score:
    """One score of one network, from what `Detector.takes` says of a batch to `[n]`.

    Detectors are fitted to the logits, features or maps of a labelled set; those of images to its features.
    """

    temperature: float | None = None  # by which logits are divided for calibration; only one score finds it

    def __init__(self, detector: "Detector", model: Model):
        if detector.cls in SCORES:  # in float64, as float32 probabilities tie near 1
            self.predict = lambda logits: SCORES[detector.cls](logits.double(), model.temperature)
            return
        from pytorch_ood import detector as library

        network, fit, predict = _LIBRARY_NAMES[detector.takes]
        arguments = detector.arguments(model)
        if "encoder" not in arguments:
            arguments[network] = model.net if detector.takes == "images" else None  # others do not run the network
        self.library = getattr(library, detector.cls)(**arguments)
        self.fit_library, self.predict = getattr(self.library, fit, None), getattr(self.library, predict)

    def fit(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        self.fit_library(values, labels)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return self.predict(values).detach()


class OpenMax(Score):
    """OpenMax looks only at the classes that occur among the predictions of a batch: a one-hot row is added for each
    missing class, so that scores do not depend on the batch."""

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        of_each_class = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        missing = values.argmax(1).bincount(minlength=values.shape[1]) == 0
        return super().__call__(torch.cat([values, of_each_class[missing]]))[: len(values)]


class InFloat64(Score):
    """Probabilities of float32 tie near 1."""

    def fit(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        super().fit(values.double(), labels)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return super().__call__(values.double())


class TemperatureScaling(InFloat64):
    """Temperature scaling of the library stops long before the minimum; this goes there."""

    def fit(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        """Find the temperature of the lowest NLL on logits `[N, K]` and labels `[N]`."""
        super().fit(values, labels)
        self.temperature = best_temperature(values.cpu().numpy(), labels.cpu().numpy())
        self.library.t.data.fill_(self.temperature)


class Gaussian(Score):
    """Distances by a covariance of the features, in float64: the library makes it in float32, and adds 1e-6 to its
    diagonal, which rounding swallows where there are fewer images than features; its inverse is noise then."""

    def fit(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        """Let the library compute with tensors of float64, which are those of its default type."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            super().fit(values.double(), labels)
        finally:
            torch.set_default_dtype(default)


class FittedOnCPU(Score):
    """KNN uses scikit-learn's neighbours, on the CPU."""

    def fit(self, values: torch.Tensor, labels: torch.Tensor) -> None:
        super().fit(values.cpu(), labels.cpu())


class OfGradients(Score):
    """A detector that differentiates each image by itself, a few images at a time."""

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.predict(part).detach() for part in values.split(GRADIENT_BATCH)])


@dataclass(frozen=True)
class Detector:
    """How a score is made."""

    cls: str  # its class in pytorch-ood, or its name in `SCORES`
    takes: str  # its input: logits, features, maps or images
    fits: bool = False  # whether it must be fitted
    arguments: Callable[[Model], dict[str, Any]] = lambda model: {}  # others keep the library's defaults
    least: int = 1  # the fewest images per class that it can be fitted on
    make: Callable[["Detector", Model], Score] = Score
    needs_head: bool = False  # whether it must know the last layer, though it takes images


DETECTORS = {
    "entropy": Detector("Entropy", "logits", make=InFloat64),
    "gen": Detector("GEN", "logits", make=InFloat64),
    "klmatching": Detector("KLMatching", "logits", True, make=InFloat64),
    "openmax": Detector("OpenMax", "logits", True, least=3, make=OpenMax),  # it fits a distribution of distances
    "tscaling": Detector("TemperatureScaling", "logits", True, make=TemperatureScaling),
    # the paper's 50 neighbours on CIFAR-10; fewer where the set is small
    "knn": Detector("KNN", "features", True, lambda m: {"k": m.neighbours(50)}, make=FittedOnCPU),
    "nnguide": Detector("NNGuide", "features", True, lambda m: {"head": m.head, "k": m.neighbours(10)}),
    "mahalanobis": Detector("Mahalanobis", "features", True, make=Gaussian),
    "rmd": Detector("RMD", "features", True, make=Gaussian),
    "gmm": Detector("GMM", "features", True),
    "vim": Detector("ViM", "features", True, lambda m: m.weights() | {"d": m.half_of_spanned()}),
    "dice": Detector("DICE", "features", True, lambda m: m.weights() | {"p": 0.9}),  # OpenOOD's
    "she": Detector("SHE", "features", True, lambda m: {"head": m.head}),
    "nci": Detector("NCI", "features", True, lambda m: {"head": m.head}),
    "fdbd": Detector("fDBD", "features", True, lambda m: {"head": m.head}),
    "pnml": Detector("PNML", "features", True, lambda m: {"head": m.head}),
    "lts": Detector("LTS", "features", False, lambda m: {"head": m.head}),
    "react": Detector("ReAct", "maps", True, lambda m: {"head": m.head_of_maps}),
    "ash": Detector("ASH", "maps", False, lambda m: {"head": m.head_of_maps}),
    "scale": Detector("SCALE", "maps", False, lambda m: {"head": m.head_of_maps}),
    "vra": Detector("VRA", "maps", True, lambda m: {"head": m.head_of_maps}),
    "rankfeat": Detector("RankFeat", "maps", False, lambda m: {"head": m.head_of_large_maps()}),
    "odin": Detector("ODIN", "images", False, lambda m: {"norm_std": list(m.std)}),
    # it differentiates the features, not the logits
    "mahalanobis_odin": Detector(
        "MahalanobisODIN",
        "images",
        True,
        lambda m: {"norm_std": list(m.std), "encoder": m.embed},
        make=Gaussian,
        needs_head=True,
    ),
    # of its gradients only those of the last layer's weight, as in the paper
    "gradnorm": Detector(
        "GradNorm", "images", False, lambda m: {"param_filter": m.is_weight_of_head}, make=OfGradients, needs_head=True
    ),
    "graduncertainty": Detector("GradUncertainty", "images", make=OfGradients),
}
ALL_DETECTORS = {name: Detector(name, "logits") for name in SCORES} | DETECTORS
ALL_SCORES = tuple(ALL_DETECTORS)
_LIBRARY_NAMES = {  # by a detector's input: its argument for the network, and its methods that fit and predict
    "logits": ("model", "fit_logits", "predict_logits"),
    "features": ("encoder", "fit_features", "predict_features"),
    "maps": ("backbone", "fit_feature_maps", "predict_feature_maps"),
    "images": ("model", "fit_features", "predict"),
}


def need_fitting(scores: Sequence[str]) -> list[str]:
    """Those of `scores` that are fitted on labelled images."""
    return [name for name in scores if ALL_DETECTORS[name].fits]


def require_library(scores: Sequence[str]) -> None:
    """Raise a `UserError` if a score needs pytorch-ood and that is not installed or too old."""
    if wanted := [name for name in scores if name in DETECTORS]:
        require_pytorch_ood(f"--score {' '.join(wanted)}")
