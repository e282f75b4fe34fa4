"""Every score of one network: building them, fitting them, and computing them in one pass where that is possible."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from utils.compute.device import Compute
from utils.core.errors import UserError, named, one_line, require
from utils.ood.scores import ALL_DETECTORS, SCORES, Detector, Model, Score, need_fitting

Embed = Callable[[nn.Module, torch.Tensor], torch.Tensor]  # network and images to what enters its last layer


@dataclass(frozen=True)
class FitSet:
    """Labelled images that detectors are fitted on."""

    name: str  # for messages
    labels: torch.Tensor  # int64 [N]
    take: Callable[[torch.Tensor], torch.Tensor]  # indices to normalised images [n, C, H, W] on the device
    was_trained_on: bool = False  # whether the networks have seen these images


class Scorer:
    """Computes every score of one network. Scores of logits, features and maps share one forward pass; scores of images
    run their own passes and gradients.

    `embed`: how features are computed (`Compute.embedding`); None: in float32, uncompiled. `last_layer`: see
    `evaluate_ood`.
    """

    def __init__(
        self,
        net: nn.Module,
        scores: Sequence[str],
        temperature: float,
        std: tuple[float, ...],
        embed: Embed | None = None,
        last_layer: str | None = None,
    ):
        self.net = net.eval()
        self.detectors: dict[str, Detector] = {name: ALL_DETECTORS[name] for name in scores}
        plain = None  # images to what enters the last layer, in float32
        if last_layer is not None:
            self.embed = plain = partial(_entering, net, _linear(net, last_layer))
        elif hasattr(net, "embed") and (last_layer := last_layer_name(net)):
            plain = net.embed
            self.embed = partial(embed or Compute().embedding(net, batch=0), net)
        self.model = Model(net, temperature, std, last_layer, plain)
        # what needs no library can be used at once
        self.scores: dict[str, Score] = {n: d.make(d, self.model) for n, d in self.detectors.items() if n in SCORES}

    def prepare(self, example: torch.Tensor, fit: FitSet | None, batch: int) -> "Scorer":
        """Build the detectors, fit them, and try each one on two of the images `example`. Returns itself.

        A `UserError` tells that a detector does not work with the network, or cannot be fitted on the set.
        """
        if len(self.scores) == len(self.detectors):
            return self
        model = self.model
        model.num_classes = self.inputs(example[:1])["logits"].shape[1]
        fewest = 0 if fit is None else int(fit.labels.bincount(minlength=model.num_classes).min())
        layer = "needs the last layer of the network: give last_layer, or leave it out"
        for name, detector in self.detectors.items():
            is_known = model.head_name or not (detector.needs_head or detector.takes in ("features", "maps"))
            require(is_known, f"--score {name}: {layer}")
            require(
                not detector.fits or fewest >= detector.least,
                f"--score {name}: needs {detector.least} or more images of each class to fit; the {fit and fit.name} "
                f"has {fewest} of one. Use --fit_on real, a larger --ipc, or leave it out",
            )
        model.num_fit = 0 if fit is None else len(fit.labels)
        if any(detector.takes == "maps" for detector in self.detectors.values()):
            model.map_shape = feature_map_shape(example[:1], model.embed)
        self.scores = {name: detector.make(detector, model) for name, detector in self.detectors.items()}
        if fit is not None:
            self._fit(fit, batch)
        inputs = self.inputs(example[:2])
        for name, score in self.scores.items():
            self._guarded(name, "does not fit this network", score, inputs[self.detectors[name].takes])
        return self

    @property
    def fitted_temperature(self) -> float | None:
        """The temperature of temperature scaling, if that is among the scores."""
        return next((score.temperature for score in self.scores.values() if score.temperature is not None), None)

    @torch.no_grad()
    def _fit(self, fit: FitSet, batch: int) -> None:
        parts = torch.arange(len(fit.labels), device=fit.labels.device).split(batch)
        if self.model.head_name is None:
            inputs = {"logits": torch.cat([self.net(fit.take(part)) for part in parts])}
        else:
            inputs = self._of_features(torch.cat([self.embed(fit.take(part)) for part in parts]))
        fitted = {name: self.detectors[name].takes for name in need_fitting(self.detectors)}
        if "images" in fitted.values():  # such a detector runs the network itself, and is fitted on what it sees then
            inputs["images"] = torch.cat([self.model.embed(fit.take(part)) for part in parts])
        what = f"cannot be fitted on the {fit.name} ({len(fit.labels)} images)"
        for name, takes in fitted.items():
            with torch.enable_grad():  # temperature scaling descends a gradient
                self._guarded(name, what, self.scores[name].fit, inputs[takes], fit.labels)

    @staticmethod
    def _guarded(name: str, what: str, function: Callable, *inputs: torch.Tensor) -> None:
        try:
            function(*inputs)
        except (ValueError, RuntimeError, AssertionError, IndexError) as error:
            raise UserError(
                f"--score {name}: {what}: {one_line(error)}. Fit it on more images (--fit_on real), or leave it out"
            ) from None

    def leads_to(self, outputs: torch.Tensor, images: torch.Tensor) -> bool:
        """Whether the logits that scores take of images are the network's outputs for them."""
        try:
            logits = self.inputs(images)["logits"]
        except (RuntimeError, TypeError, AttributeError, IndexError):  # no features, or others than the layer takes
            return False
        return logits.shape == outputs.shape and torch.allclose(logits, outputs, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def inputs(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What scores take: images and logits, and if the last layer is known, features and perhaps maps."""
        if self.model.head_name is None:
            return {"images": images, "logits": self.net(images)}
        return {"images": images} | self._of_features(self.embed(images))

    def _of_features(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        shape = self.model.map_shape
        maps = {} if shape is None else {"maps": features.unflatten(1, shape)}
        return {"features": features, "logits": self.model.head(features)} | maps

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, batch: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits float64 `[N, num_classes]` and every score float64 `[N]` of images `[N, C, H, W]`."""
        parts = []
        for inputs in map(self.inputs, images.split(batch)):
            scores = {name: score(inputs[self.detectors[name].takes]) for name, score in self.scores.items()}
            parts.append((inputs["logits"], *scores.values()))
        logits, *scores = (torch.cat(values).double().cpu().numpy() for values in zip(*parts, strict=True))
        return logits, dict(zip(self.scores, scores, strict=True))


def last_layer_name(net: nn.Module) -> str | None:
    """The name of the linear layer that turns the features of a network of `networks/` into logits; of others None."""
    return next((n for n in ("classifier", "fc", "fc_3") if isinstance(getattr(net, n, None), nn.Linear)), None)


def _linear(net: nn.Module, name: str) -> nn.Linear:
    layers = {n: layer for n, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    has = named([*layers]) or "none"
    require(name in layers, f"last_layer {name}: is no linear layer of the network; it has {has}")
    return layers[name]


def _entering(net: nn.Module, head: nn.Linear, images: torch.Tensor) -> torch.Tensor:
    """What enters a layer when the network sees images."""
    seen: list[torch.Tensor] = []
    with head.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0])):
        net(images)
    return seen[0]


@torch.no_grad()
def feature_map_shape(image: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, int, int]:
    """The shape `(C, H, W)` of the map that `embed` flattens into features; `(D, 1, 1)` if there is none.

    It is that of the last module that gives a map of as many values.
    """
    outputs = []
    with register_module_forward_hook(lambda module, inputs, output: outputs.append(output)):
        features = embed(image).shape[1]
    shapes = [tuple(output.shape[1:]) for output in outputs if isinstance(output, torch.Tensor)]
    return next((s for s in reversed(shapes) if len(s) == 3 and np.prod(s) == features), (features, 1, 1))
