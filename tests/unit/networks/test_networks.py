"""Networks against published parameter names, shapes and counts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks import MODEL_NAMES, get_network, initialize
from utils.core.errors import UserError
from utils.core.rng import generator

# counts for 3×32×32 and ten classes, as published for these architectures
COUNTS = {
    "MLP": 411_146,
    "ConvNet": 320_010,
    "LeNet": 62_006,
    "AlexNet": 1_872_202,
    "VGG11": 9_231_114,
    "VGG13": 9_416_010,
    "VGG16": 14_728_266,
    "VGG19": 20_040_522,
    "ResNet18": 11_173_962,
    "ResNet34": 21_282_122,
    "ResNet50": 23_520_842,
    "ResNet101": 42_512_970,
    "ResNet152": 58_156_618,
}
BIG = {"ResNet34", "ResNet50", "ResNet101", "ResNet152", "VGG13", "VGG16", "VGG19", "ResNet18BN_AP"}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        net = get_network(name, 3, 10, (32, 32))
    assert sum(p.numel() for p in net.parameters()) == count


def test_convnet_names_and_shapes():
    state = get_network("ConvNet", 3, 10, (32, 32)).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    assert shapes == {
        "features.0.weight": (128, 3, 3, 3), "features.0.bias": (128,),
        "features.1.weight": (128,), "features.1.bias": (128,),
        "features.4.weight": (128, 128, 3, 3), "features.4.bias": (128,),
        "features.5.weight": (128,), "features.5.bias": (128,),
        "features.8.weight": (128, 128, 3, 3), "features.8.bias": (128,),
        "features.9.weight": (128,), "features.9.bias": (128,),
        "classifier.weight": (10, 2048), "classifier.bias": (10,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameter", "shape"),
    [
        ("ConvNetNN", "features.3.weight", (128, 128, 3, 3)),
        ("ConvNetNP", "classifier.weight", (10, 128 * 32 * 32)),
        ("ConvNetLN", "features.1.weight", (128, 32, 32)),
        ("ConvNetBN", "features.1.running_mean", (128,)),
        ("ConvNetASwishBN", "features.9.running_var", (128,)),
        ("ConvNetW64", "features.8.weight", (64, 64, 3, 3)),
        ("ConvNetD4", "features.12.weight", (128, 128, 3, 3)),
        ("LeNet", "fc_1.weight", (120, 400)),
        ("AlexNet", "fc.weight", (10, 192 * 16)),
        ("AlexNetBN", "features.4.weight", (192, 128, 5, 5)),
        ("VGG11", "features.4.weight", (128, 64, 3, 3)),
        ("ResNet18", "layer2.0.shortcut.0.weight", (128, 64, 1, 1)),
        ("ResNet18", "layer2.0.shortcut.1.weight", (128,)),
        ("ResNet18_AP", "layer2.0.shortcut.2.weight", (128,)),
        ("ResNet18_AP", "classifier.weight", (10, 512 * 16)),
        ("ResNet50", "layer1.0.conv3.weight", (256, 64, 1, 1)),
    ],
)
def test_published_names(name, parameter, shape):
    with torch.device("meta"):
        net = get_network(name, 3, 10, (32, 32))
    assert tuple(net.state_dict()[parameter].shape) == shape


@pytest.mark.parametrize(
    ("name", "parameter", "shape"),
    [
        ("ConvNet", "classifier.weight", (10, 128 * 4 * 4)),
        ("LeNet", "fc_1.weight", (120, 400)),
        ("AlexNet", "fc.weight", (10, 192 * 4 * 4)),
        ("VGG11", "classifier.weight", (10, 512)),
        ("ResNet18", "classifier.weight", (10, 512)),
        ("ResNet18_AP", "classifier.weight", (10, 512 * 3 * 3)),
    ],
)
def test_one_channel_28(name, parameter, shape):
    net = get_network(name, 1, 10, (28, 28))
    assert tuple(net.state_dict()[parameter].shape) == shape
    assert net(torch.randn(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", [n for n in MODEL_NAMES if n not in BIG])
def test_embed_enters_the_last_linear_layer(name):
    net = get_network(name, 3, 7, (32, 32), generator(0, name)).eval()
    images = torch.randn(2, 3, 32, 32)
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        torch.testing.assert_close(last(net.embed(images)), net(images))
    assert net(images).shape == (2, 7)


def test_convnet_equals_functional_calls():
    """The default ConvNet, written out with functions."""
    net = get_network("ConvNetW32", 3, 10, (32, 32), generator(3))
    x = images = torch.randn(4, 3, 32, 32)
    for block in (0, 4, 8):
        conv, norm = net.features[block], net.features[block + 1]
        x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        x = F.instance_norm(x, weight=norm.weight, bias=norm.bias)
        x = F.avg_pool2d(F.relu(x), 2)
    torch.testing.assert_close(net(images), F.linear(x.flatten(1), net.classifier.weight, net.classifier.bias))


def test_pooled_block_by_hand():
    """ResNet18_AP takes a stride as average pooling: in the block after the activation, in the shortcut "
    "before the norm."""
    block = get_network("ResNet18_AP", 3, 10, (32, 32), generator(0)).layer2[0]
    x = torch.randn(2, 64, 8, 8)
    out = F.avg_pool2d(F.relu(block.bn1(F.conv2d(x, block.conv1.weight, padding=1))), 2)
    out = block.bn2(F.conv2d(out, block.conv2.weight, padding=1))
    short = block.shortcut[2](F.avg_pool2d(F.conv2d(x, block.shortcut[0].weight), 2))
    torch.testing.assert_close(block(x), F.relu(out + short))


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("LeNet", 16), ("VGG11", 32), ("ResNet18", 25), ("ConvNetD4", 16),
        ("ResNet18_AP", 16),  # InstanceNorm of one value is a constant
        ("ResNet18BN_AP", 8),
    ],
)  # fmt: skip
def test_smallest_size_is_named_and_works(name, side):
    with pytest.raises(UserError, match=f"smallest size it takes is {side}x{side}"):
        get_network(name, 3, 10, (side - 1, side - 1))
    assert get_network(name, 3, 10, (side, side)).eval()(torch.randn(2, 3, side, side)).shape == (2, 10)


def test_unknown_name_points_at_the_nearest():
    with pytest.raises(UserError, match="did you mean ConvNet\\?"):
        get_network("ConvNt", 3, 10, (32, 32))


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetBN", "LeNet", "ResNet18"])
def test_keyed_initialisation(name):
    """Same key, same bits; the global generator is neither used nor moved; bounds are PyTorch's defaults."""
    before = torch.random.get_rng_state()
    first, second = (get_network(name, 3, 10, (32, 32), generator(1, "a")) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    other = initialize(get_network(name, 3, 10, (32, 32)), generator(1, "a"))
    for a, b, c in zip(*(n.state_dict().values() for n in (first, second, other)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    for module in first.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            assert 0.8 * bound < module.weight.abs().max() <= bound
            assert abs(module.weight.std() - bound / 3**0.5) < 0.25 * bound


def test_a_module_that_initialize_does_not_know():
    """Its parameters, or buffers, would stay uninitialised memory."""
    with_buffer = nn.ReLU()
    with_buffer.register_buffer("scale", torch.ones(4))
    for module in (nn.Conv1d(1, 1, 1), with_buffer):
        with pytest.raises(TypeError, match=f"does not know the parameters or buffers of {type(module).__name__}"):
            initialize(nn.Sequential(nn.Linear(2, 2), module), torch.Generator())
