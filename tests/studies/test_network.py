"""The paper's network has the paper's shapes, at any width."""

import pytest
import torch
from torch import nn

from studies.networks import VGG16BN, vgg16_bn


def on_meta(width: float) -> VGG16BN:
    """Shapes without storage: 50 million weights cost nothing."""
    with torch.device("meta"):
        return vgg16_bn(width)


def test_the_fc_layers_have_the_papers_sizes_at_width_1() -> None:
    model = on_meta(1.0)  # footnote 21: 16384-in x 2048-out with dropout 0.5, then 2048-in x 10-out
    assert (model.fc0.in_features, model.fc0.out_features) == (16384, 2048)
    assert (model.fc1.in_features, model.fc1.out_features) == (2048, 10)
    assert model.dropout.p == 0.5


def test_the_features_keep_the_images_width_and_reduce_its_height_to_1() -> None:
    features = on_meta(1.0).features(torch.empty(2, 3, 32, 32, device="meta"))
    assert features.shape == (2, 512, 1, 32)


def test_there_are_13_convolutions_each_with_batchnorm_and_five_pools_2x1() -> None:
    modules = list(on_meta(1.0).features)
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    channels = [convolution.out_channels for convolution in convolutions]
    assert channels == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert all(convolution.kernel_size == (3, 3) for convolution in convolutions)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == 13
    pools = [module.kernel_size for module in modules if isinstance(module, nn.MaxPool2d)]
    assert pools == [(2, 1)] * 5


@pytest.mark.parametrize(("width", "fc0"), [(1 / 8, (2048, 256)), (1 / 16, (1024, 128)), (1 / 1000, (32, 2))])
def test_the_width_scales_every_channel_count_and_the_hidden_layer(width: float, fc0: tuple[int, int]) -> None:
    model = on_meta(width)
    assert (model.fc0.in_features, model.fc0.out_features) == fc0
    assert model(torch.empty(4, 3, 32, 32, device="meta")).shape == (4, 10)


def test_fc0_may_have_the_papers_size_behind_narrow_convolutions() -> None:
    with torch.device("meta"):
        model = vgg16_bn(1.0, before=1 / 8)
    channels = [module.out_channels for module in model.features if isinstance(module, nn.Conv2d)]
    assert channels == [8] * 2 + [16] * 2 + [32] * 3 + [64] * 5 + [512]
    assert (model.fc0.in_features, model.fc0.out_features) == (16384, 2048)
    assert model(torch.empty(4, 3, 32, 32, device="meta")).shape == (4, 10)


def test_the_weights_follow_the_global_seed_and_biases_of_convolutions_start_at_0() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(vgg16_bn(1 / 16).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["fc0.weight"], states[2]["fc0.weight"])
    assert not states[0]["features.0.bias"].any()
