"""Networks on the test images and on OOD sets: their scores, and the measures of them."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from utils.compute import distributed
from utils.core.errors import print_line, require, unknown_name
from utils.data.datasets import RealData
from utils.ood.measures import MEASURES, calibration, confidence_and_correct, error_detection, ood_measures
from utils.ood.scorer import FitSet, Scorer
from utils.ood.scores import ALL_SCORES, need_fitting, require_library
from utils.ood.sets import OODSet


@dataclass
class NetworkScores:
    """One network on the test images and on the OOD sets."""

    errors: dict[str, float]  # error detection and calibration, by measure; with tscaling also calibration after it
    confidence: np.ndarray  # of each test image, [N]
    correct: np.ndarray  # whether each test image is classified correctly, [N]
    in_scores: dict[str, np.ndarray]  # by score, of the test images, [N]
    out_scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # by set and score, [M]
    measures: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # by set and score: `MEASURES`

    @property
    def accuracy(self) -> float:
        return 1 - self.errors["error"]


def _given_set(name: str, images: torch.Tensor, real: RealData) -> OODSet:
    """A set of normalised images `[M, C, H, W]`; a `UserError` tells that they have another shape, or are pixels."""
    pixels = "like pixels; give normalised images: real.normalize(images in [0, 1])"
    require(images.is_floating_point(), f"sets: {name} has numbers of the type {images.dtype}, {pixels}")
    found, wanted = list(images.shape[1:]), [real.channel, *real.im_size]
    require(found == wanted, f"sets: {name} has images {found}; those of {real.name} are {wanted}")
    black, white = (real.normalize(torch.full((1, *wanted), v, device=real.device)) for v in (0.0, 1.0))
    low, high = images.min(), images.max()
    is_like_pixels = black.min() < 0 <= low and (0.5 < high <= 1 or high > 10 * white.max())
    require(not is_like_pixels, f"sets: {name} has numbers from {low:g} to {high:g}, {pixels}")
    return OODSet(name, "given", len(images), lambda: images)


def evaluate_ood(
    net: nn.Module,
    real: RealData,
    sets: Sequence[OODSet] | Mapping[str, torch.Tensor],
    scores: Sequence[str] = ("msp",),
    fit: FitSet | None = None,
    last_layer: str | None = None,
    temperature: float = 1.0,
    batch: int = 256,
) -> NetworkScores:
    """Test a network from anywhere as stage 3 tests those of stage 2.

    Args:
        net: gives logits `[N, num_classes]` of normalised images, on the device of `real`; it is set to `eval()`.
        sets: what `OODSource.find_all` returns, or normalised images `[M, C, H, W]` by name.
        scores: of `ALL_SCORES`.
        fit: the images that detectors are fitted on; left out: the training images of `real`.
        last_layer: the name of the linear layer that gives the logits, e.g. `fc`. Only scores of features need it, and
            networks of `networks/` do not.
        temperature: of the score energy; batch: images per forward pass.
    Raises:
        UserError: when a score is unknown or does not fit the network, when images have another shape or are not
            normalised, and when outputs are not finite.
    """
    for name in scores:
        require(name in ALL_SCORES, unknown_name("score", name, ALL_SCORES))
    require_library(scores)
    if isinstance(sets, Mapping):
        sets = [_given_set(name, images, real) for name, images in sets.items()]
    if fit is None and need_fitting(scores):
        fit = FitSet("real training set", real.labels_train, real.train_batch, was_trained_on=True)
    scorer = Scorer(net, scores, temperature, deviation(real), last_layer=last_layer)
    images = real.test_images[:2]
    with torch.no_grad():
        outputs = scorer.net(images)
    found = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    wanted = [len(images), real.num_classes]
    require(found == wanted, f"net: gives {found} for {len(images)} images; it must give logits {wanted}")
    if not scorer.leads_to(outputs, images):
        told = f"last_layer {last_layer}: its outputs are not those of the network; name the layer that gives them"
        require(last_layer is None, told)
        scorer.model.head_name = None  # the network's `embed` is something else than in `networks/`
    scorer.prepare(images, fit, batch)
    return score_networks({0: scorer}, real, sets, batch)[0]


def deviation(real: RealData) -> tuple[float, ...]:
    """By what the pixels of normalised images were divided; whitened ones by nothing."""
    return real.std if real.zca is None else (1.0,) * real.channel


def score_networks(
    scorers: Mapping[int, Scorer],
    real: RealData,
    sets: Sequence[OODSet],
    batch: int,
    log: Callable[[str], None] = print_line,
    after_set: Callable[[], None] = lambda: None,
) -> list[NetworkScores]:
    """Score the networks of this process, by index; returns those of all processes, in order.

    A score that is not finite has measures of NaN and a line in the log: it must not end a long run. A `UserError`
    tells of a network whose outputs are not finite, and of a set most of whose images are test images.
    """
    own = {index: _on_test_images(index, scorer, real, batch) for index, scorer in scorers.items()}
    known = set(map(_digest, real.test_images.cpu())) if sets else set()
    for ood in sets:
        images = ood.load()
        same = sum(_digest(image) in known for image in images.cpu())
        told = f"--ood_sets {ood.name}: {same} of its {len(images)} images are test images of {real.name}"
        require(2 * same <= len(images), f"{told}; leave it out")
        if same and distributed.is_main():
            log(told)
        for index, scorer in scorers.items():
            network, found = own[index], scorer(images, batch)[1]
            network.out_scores[ood.name], network.measures[ood.name] = found, {}
            for name, outside in found.items():
                inside, measures = network.in_scores[name], dict.fromkeys(MEASURES, math.nan)
                if np.isfinite(inside).all() and np.isfinite(outside).all():
                    measures = ood_measures(inside, outside)
                else:
                    log(f"scores not finite, no measures (score, set, network): {name}, {ood.name}, {index}")
                network.measures[ood.name][name] = measures
        after_set()
    return list(distributed.gather(own).values())


def _digest(image: torch.Tensor) -> bytes:
    return hashlib.sha256(image.detach().numpy().tobytes()).digest()


def _on_test_images(index: int, scorer: Scorer, real: RealData, batch: int) -> NetworkScores:
    labels = real.labels_test.cpu().numpy()
    logits, scores = scorer(real.test_images, batch)
    require(np.isfinite(logits).all(), f"--folder: network {index} has outputs that are not finite; train it again")
    errors = error_detection(logits, labels) | calibration(logits, labels)
    if temperature := scorer.fitted_temperature:
        scaled = calibration(logits / temperature, labels)
        errors |= {"temperature": temperature} | {f"scaled_{name}": value for name, value in scaled.items()}
    return NetworkScores(errors, *confidence_and_correct(logits, labels), scores)
