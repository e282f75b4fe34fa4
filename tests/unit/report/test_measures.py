"""The catalogue of measures, against what a good and a bad network measure; and the templates."""

import html
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.data.synthetic import SyntheticSet
from utils.ood.measures import MEASURES, calibration, error_detection, ood_measures
from utils.report.card import Published, card
from utils.report.compare import Comparison
from utils.report.results import NETWORK_MEASURES, Results
from utils.report.study import NamedResults
from utils.report.tables import OF_NETWORKS, OF_OOD


def of_network(noise: float) -> dict[str, float]:
    """Measures of a network whose logits are right but for noise."""
    g = np.random.default_rng(0)
    labels = g.integers(0, 5, 500)
    logits = 3 * np.eye(5)[labels] + noise * g.normal(size=(500, 5))
    scaled = {f"scaled_{name}": value for name, value in calibration(logits / 1.5, labels).items()}
    errors = error_detection(logits, labels) | calibration(logits, labels) | scaled
    return errors | {"accuracy": 1 - errors["error"]}


def of_detector(shift: float) -> dict[str, float]:
    g = np.random.default_rng(0)
    return ood_measures(g.normal(size=300), shift + g.normal(size=300))


def test_the_catalogue_is_complete():
    assert list(OF_OOD) == list(MEASURES)
    assert {*OF_NETWORKS} == {"accuracy", *NETWORK_MEASURES}


@pytest.mark.parametrize("name", [name for name, measure in OF_NETWORKS.items() if measure.better and name != "aupr"])
def test_which_way_is_better_for_networks(name):
    """But AUPR of error detection, which grows with the number of errors, too."""
    good, bad = of_network(1)[name], of_network(9)[name]
    assert OF_NETWORKS[name].better == ("↑" if good > bad else "↓")


@pytest.mark.parametrize("name", OF_OOD)
def test_which_way_is_better_for_detection(name):
    assert OF_OOD[name].better == ("↑" if of_detector(2)[name] > of_detector(0.1)[name] else "↓")


def test_values_are_shown_in_their_unit():
    assert OF_OOD["auroc"].cell([0.25, 0.75]) == "50.00 ± 25.00"
    assert OF_NETWORKS["nll"].cell([0.25, 0.75, np.nan]) == "0.500 ± 0.250 (2 of 3)"
    assert OF_NETWORKS["temperature"].cell([1.5]) == "1.50"
    assert [OF_NETWORKS[n].heading for n in ("ece", "temperature", "auroc")] == [
        "ECE ↓",
        "temperature",
        "error AUROC ↑",
    ]


NASTY = "<b onclick='x()'>&\"{{ 1 }}"


def test_a_page_escapes_what_it_shows():
    """Names, sets, scores and notes: as the standard library reads them back."""
    row = {"network": 0, "set": f"set {NASTY}", "score": f"score {NASTY}", **dict.fromkeys(MEASURES, 0.5)}
    column = NamedResults(f"name {NASTY}", {Path(): Results([dict.fromkeys(NETWORK_MEASURES, 0.5)], [row])})
    page = Comparison([column], ["auroc"]).page(None, [f"note {NASTY}"])
    assert "<b" not in page.replace("<body>", "")
    shown = html.unescape(page)
    assert all(f"{what} {NASTY}" in shown for what in ("set", "score", "name", "note"))


def test_a_card_takes_text_as_it_is():
    """Markdown is not escaped, and text of the user is no template."""
    synthetic = SyntheticSet(torch.zeros(10, 1, 8, 8), torch.arange(10))
    text = card(Published(synthetic, (0.1,), (1 / 3,), None, NASTY, 10, source=f"Read as: {NASTY}."))
    assert f"Read as: {NASTY}." in text
    assert f"the training set of {NASTY} (10 classes)" in text
    assert "([0.1], [0.3333333333333333])" in text
