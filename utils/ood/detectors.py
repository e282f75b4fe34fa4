"""All scores of one network: those of `utils/ood/scores.py`, and the detectors of the optional package pytorch-ood.

Included are the detectors that need only a classifier and, if they are fitted, a labelled set. Excluded are those of
pytorch-ood that need more: a choice of layers (Gram, MultiMahalanobis, NACUE), dropout (MCD), text (MCM) or trained
weights (WeightedEBO); and those that `utils/ood/scores.py` implements itself (MaxSoftmax, MaxLogit, EnergyBased).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.compute.device import Compute
from utils.compute.version import require_pytorch_ood
from utils.core.errors import UserError, one_line
from utils.ood.calibration import best_temperature
from utils.ood.scores import SCORES

LAST_LAYERS = ("classifier", "fc", "fc_3")
GRADIENT_BATCH = 32  # per-image gradients need this many copies of the parameters


@dataclass(frozen=True)
class FitSet:
    """Labelled images that detectors are fitted on.

    `name`: for messages; `labels`: int64 `[N]`; `take`: indices to normalised images `[n, C, H, W]` on the device;
    `was_trained_on`: whether the networks have seen these images.
    """

    name: str
    labels: torch.Tensor
    take: Callable[[torch.Tensor], torch.Tensor]
    was_trained_on: bool = False


@dataclass(frozen=True)
class _Model:
    """What detectors are built from: the network, its last layer, the shape `(C, H, W)` of its last feature map, the
    number of images and classes they are fitted on, and the standard deviation that images were divided by."""

    net: nn.Module
    head: nn.Linear
    map_shape: tuple[int, int, int]
    num_fit: int
    num_classes: int
    std: tuple[float, ...]

    @property
    def neighbours(self) -> int:
        """The mean number of images per class: more neighbours would have to come from other classes."""
        return max(1, self.num_fit // self.num_classes)

    @property
    def rank(self) -> int:
        """The most dimensions that the features of the fitting set can span."""
        return min(self.head.in_features, max(1, self.num_fit))


@dataclass(frozen=True)
class Detector:
    """A detector of pytorch-ood: its class, its input (`logits`, `features`, `maps` or `images`), whether it must be
    fitted, its arguments (others keep the library's defaults), and the fewest images per class that it can be fitted
    on."""

    cls: str
    takes: str
    fits: bool
    arguments: Callable[[_Model], dict[str, Any]] = lambda model: {}
    least: int = 1


def _head(model: _Model) -> dict[str, Any]:
    return {"head": model.head}


def _weights(model: _Model) -> dict[str, Any]:
    return {"w": model.head.weight, "b": model.head.bias}


DETECTORS = {
    "entropy": Detector("Entropy", "logits", False),
    "gen": Detector("GEN", "logits", False),
    "klmatching": Detector("KLMatching", "logits", True),
    "openmax": Detector("OpenMax", "logits", True, least=3),  # it fits a distribution of distances
    "tscaling": Detector("TemperatureScaling", "logits", True),
    # the paper's 50 neighbours on CIFAR-10; fewer where the set is small
    "knn": Detector("KNN", "features", True, lambda m: {"k": min(50, m.neighbours)}),
    "nnguide": Detector("NNGuide", "features", True, lambda m: _head(m) | {"k": min(10, m.neighbours)}),
    "mahalanobis": Detector("Mahalanobis", "features", True),
    "rmd": Detector("RMD", "features", True),
    "gmm": Detector("GMM", "features", True),
    # half of the spanned dimensions are principal, so that the residual does not vanish on the fitting set
    "vim": Detector("ViM", "features", True, lambda m: _weights(m) | {"d": max(1, m.rank // 2)}),
    "dice": Detector("DICE", "features", True, lambda m: _weights(m) | {"p": 0.9}),  # OpenOOD's
    "she": Detector("SHE", "features", True, _head),
    "nci": Detector("NCI", "features", True, _head),
    "fdbd": Detector("fDBD", "features", True, _head),
    "pnml": Detector("PNML", "features", True, _head),
    "lts": Detector("LTS", "features", False, _head),
    "react": Detector("ReAct", "maps", True),
    "ash": Detector("ASH", "maps", False),
    "scale": Detector("SCALE", "maps", False),
    "vra": Detector("VRA", "maps", True),
    "rankfeat": Detector("RankFeat", "maps", False),
    "odin": Detector("ODIN", "images", False, lambda m: {"norm_std": list(m.std)}),
    "mahalanobis_odin": Detector("MahalanobisODIN", "images", True, lambda m: {"norm_std": list(m.std)}),
    # as in its paper, only the gradient of the last layer
    "gradnorm": Detector(
        "GradNorm", "images", False, lambda m: {"param_filter": lambda name: name.split(".")[0] in LAST_LAYERS}
    ),
    "graduncertainty": Detector("GradUncertainty", "images", False),
}
ALL_SCORES = (*SCORES, *DETECTORS)
# by a detector's input: the name of its network argument, and of its methods
_NETWORK = {"logits": "model", "features": "encoder", "maps": "backbone", "images": "model"}
_FIT = {"logits": "fit_logits", "features": "fit_features", "maps": "fit_feature_maps", "images": "fit_features"}
_PREDICT = {"logits": "predict_logits", "features": "predict_features", "maps": "predict_feature_maps"}


def need_fitting(scores: Sequence[str]) -> list[str]:
    """Those of `scores` that are fitted on labelled images."""
    return [name for name in scores if name in DETECTORS and DETECTORS[name].fits]


def require_library(scores: Sequence[str]) -> None:
    """Raise a `UserError` if a score needs pytorch-ood and that is not installed or too old."""
    wanted = [name for name in scores if name in DETECTORS]
    if not wanted:
        return
    require_pytorch_ood(f"--score {' '.join(wanted)}")
    from pytorch_ood import detector

    for name in wanted:
        spec = DETECTORS[name]
        if not hasattr(getattr(detector, spec.cls, None), _PREDICT.get(spec.takes, "predict")):
            raise UserError(
                f"--score {name}: this version of pytorch-ood does not have it: pip install --upgrade pytorch-ood"
            )


def last_layer(net: nn.Module) -> nn.Linear:
    """The linear layer that turns features into logits."""
    return next(getattr(net, name) for name in LAST_LAYERS if hasattr(net, name))


@torch.no_grad()
def feature_map_shape(net: nn.Module, image: torch.Tensor) -> tuple[int, int, int]:
    """The shape `(C, H, W)` of the map that is flattened into the features; `(D, 1, 1)` if there is none.

    Args:
        image: `[1, C, H, W]`.
    """
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        shapes.append(tuple(output.shape[1:]))

    hooks = [module.register_forward_hook(note) for module in net.modules() if module is not net]
    features = net.embed(image).shape[1]
    for hook in hooks:
        hook.remove()
    maps = [s for s in shapes if len(s) == 3 and np.prod(s) == features]
    return maps[-1] if maps else (features, 1, 1)


class Scorer:
    """Computes every score of one network. Scores of logits, features and maps share one forward pass; scores of images
    run their own passes and gradients.

    `embed`: how features are computed (`Compute.embedding`); None: in float32, uncompiled.
    """

    def __init__(
        self,
        net: nn.Module,
        scores: Sequence[str],
        temperature: float,
        std: tuple[float, ...],
        embed: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
    ):
        self.net, self.scores, self.temperature, self.std = net.eval(), tuple(scores), temperature, std
        self.embed = embed or Compute().embedding(net, batch=0)
        self.head = last_layer(net)
        self.detectors: dict[str, Any] = {}
        self.fitted_temperature: float | None = None  # of temperature scaling

    def prepare(self, example: torch.Tensor, fit: FitSet | None, batch: int) -> "Scorer":
        """Build the detectors, fit them, and try each one on two images. Returns itself.

        Args:
            example: some normalised images `[n, C, H, W]`; fit: the set to fit on, if any score needs one.
        Raises:
            UserError: when a detector does not work with the network, or cannot be fitted on the set.
        """
        names = [name for name in self.scores if name in DETECTORS]
        if not names:
            return self
        shape = feature_map_shape(self.net, example[:1])
        if "rankfeat" in names and shape[1] * shape[2] == 1:
            raise UserError(
                f"--score rankfeat: takes a feature map of more than one pixel; {type(self.net).__name__} ends in "
                f"{shape[0]} features without one. Leave it out or choose another --model"
            )
        if fit is not None:
            self._check_enough(fit)
        num_fit = 0 if fit is None else len(fit.labels)
        model = _Model(self.net, self.head, shape, num_fit, self.head.out_features, self.std)
        self.map_shape = shape
        self.detectors = {name: self._build(DETECTORS[name], model) for name in names}
        if fit is not None:
            self._fit(fit, batch)
        for name in names:
            self._guarded(name, "does not fit this network", partial(self._of_detector, name), example[:2])
        return self

    def _check_enough(self, fit: FitSet) -> None:
        fewest = int(fit.labels.bincount(minlength=self.head.out_features).min())
        for name in need_fitting(self.scores):
            least = DETECTORS[name].least
            if fewest < least:
                raise UserError(
                    f"--score {name}: needs {least} or more images of each class to fit; the {fit.name} has {fewest} "
                    "of one. Use --fit_on real, a larger --ipc, or leave it out"
                )

    def _build(self, spec: Detector, model: _Model) -> object:
        from pytorch_ood import detector

        network = self.net if spec.takes == "images" else None
        arguments = {_NETWORK[spec.takes]: network} | spec.arguments(model)
        if spec.cls == "MahalanobisODIN":
            arguments = {"encoder": self.net.embed, "norm_std": list(self.std)}
        if spec.takes == "maps":
            # VRA passes its maps on the CPU, whatever the network's device
            arguments["head"] = lambda maps: self.head(maps.flatten(1).to(self.head.weight.device))
        return getattr(detector, spec.cls)(**arguments)

    @torch.no_grad()
    def _fit(self, fit: FitSet, batch: int) -> None:
        index = torch.arange(len(fit.labels), device=fit.labels.device)
        batches = index.split(batch)
        features = torch.cat([self.embed(self.net, fit.take(part)) for part in batches])
        for name in need_fitting(self.scores):
            takes = DETECTORS[name].takes
            if takes == "images":  # its scores run the network itself
                values = torch.cat([self.net.embed(fit.take(part)) for part in batches])
            elif takes == "logits":
                values = self.head(features)
            else:
                values = features.unflatten(1, self.map_shape) if takes == "maps" else features
            labels = fit.labels
            if name == "knn":  # it uses scikit-learn's neighbours, on the CPU
                values, labels = values.cpu(), labels.cpu()
            with torch.enable_grad():  # temperature scaling descends a gradient
                what = f"cannot be fitted on the {fit.name} ({len(labels)} images)"
                self._guarded(name, what, getattr(self.detectors[name], _FIT[takes]), values, labels)
            if name == "tscaling":
                self._guarded(name, what, self._fit_temperature, values, labels)

    def _fit_temperature(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Temperature scaling of the library stops long before the minimum; this goes there."""
        self.fitted_temperature = best_temperature(logits.cpu().numpy(), labels.cpu().numpy())
        self.detectors["tscaling"].t.fill_(self.fitted_temperature)

    def _guarded(self, name: str, what: str, function: Callable, *inputs: torch.Tensor) -> None:
        try:
            function(*inputs)
        except (ValueError, RuntimeError, AssertionError, IndexError) as error:
            reason = one_line(error)
            raise UserError(
                f"--score {name}: {what}: {reason}. Fit it on more images (--fit_on real), or leave it out"
            ) from None

    def _of_detector(self, name: str, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.net.embed(images)
            return self._score(name, images, features, self.head(features))

    def _score(self, name: str, images: torch.Tensor, features: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """One score of a batch, `[n]`; higher = more out-of-distribution, as in pytorch-ood."""
        if name in SCORES:
            return SCORES[name](logits.double(), self.temperature)  # float32 probabilities tie near 1
        takes = DETECTORS[name].takes
        if takes == "images":
            parts = images.split(GRADIENT_BATCH if "grad" in name else len(images))
            return torch.cat([self.detectors[name].predict(part).detach() for part in parts])
        values = logits if takes == "logits" else features
        if takes == "maps":
            values = features.unflatten(1, self.map_shape)
        if name == "tscaling":  # as those of SCORES
            values = values.double()
        predict = getattr(self.detectors[name], _PREDICT[takes])
        if name == "openmax":  # it measures the distances to the classes that a batch is predicted to be of: to all
            of_each_class = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
            lacking = values.argmax(1).bincount(minlength=values.shape[1]) == 0
            return predict(torch.cat([values, of_each_class[lacking]])).detach()[: len(values)]
        return predict(values).detach()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, batch: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits float64 `[N, num_classes]` and every score float64 `[N]` of images `[N, C, H, W]`, including a last
        partial batch."""
        logits: list[torch.Tensor] = []
        scores: dict[str, list[torch.Tensor]] = {name: [] for name in self.scores}
        for part in images.split(batch):
            features = self.embed(self.net, part)
            logits.append(self.head(features))
            for name, values in scores.items():
                values.append(self._score(name, part, features, logits[-1]))
        arrays = {name: torch.cat(values).double().cpu().numpy() for name, values in scores.items()}
        return torch.cat(logits).double().cpu().numpy(), arrays
