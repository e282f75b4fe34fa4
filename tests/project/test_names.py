"""Names that other tools import: they stay where they are."""

from importlib import import_module
from inspect import signature

import pytest

NAMES = {
    "networks.get_network": ["name", "channel", "num_classes", "im_size"],
    "utils.training.losses.uniform_cross_entropy": ["logits"],
    "utils.methods.distances.match_loss": ["grads_syn", "grads_real", "metric"],
    "utils.outliers.corruptions.corrupt": ["images", "name", "generator"],
    "utils.ood.measures.ood_measures": ["in_scores", "out_scores"],
    "utils.data.datasets.load_dataset": ["name", "data_path"],
    "utils.core.rng.generator": ["seed"],
    "utils.ood.evaluate_ood": ["net", "real", "sets", "scores"],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_and_its_first_arguments_stay(name):
    module, function = name.rsplit(".", 1)
    found = list(signature(getattr(import_module(module), function)).parameters)
    assert found[: len(NAMES[name])] == NAMES[name]


def test_the_lists_of_networks_and_methods_stay():
    from networks import MODEL_NAMES
    from utils.methods import METHODS

    assert {"ConvNet", "ConvNetW32", "MLP", "ResNet18"} <= set(MODEL_NAMES)
    assert {"DC", "DSA", "DM", "MTT", "TGDD"} <= set(METHODS)
