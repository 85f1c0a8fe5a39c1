"""CoTNet-50 and CoTNet-101 in PyTorch, as peers in benchmarks. Importing it needs torch.

The network of docs/cot_layer.md with the aggregation by ``unfold``, which runs wherever PyTorch
does. Parameters have the published names, so that ``to_torch_state_dict`` gives their values.
"""

import torch
from torch import nn
from torch.nn import functional as F

from cotnet_jax.models.cotnet import EXPANSION
from cotnet_jax.models.variants import get_variant


class CoT(nn.Module):
    """Contextual Transformer block [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight_channels = channels // 8
        self.key_embed = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=4, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
        self.embed = nn.Sequential(
            nn.Conv2d(2 * channels, channels // 2, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, 9 * self.weight_channels, 1),
            nn.GroupNorm(self.weight_channels, 9 * self.weight_channels),
        )
        self.conv1x1 = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.bn = nn.BatchNorm2d(channels)
        hidden = max(channels // 2, 32)
        self.se = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * channels, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, channels, height, width = x.shape
        static = self.key_embed(x)
        weights = self.embed(torch.cat([x, static], 1))
        weights = weights.view(size, 1, self.weight_channels, 9, height * width)
        values = F.unfold(self.conv1x1(x), 3, padding=1)
        values = values.view(size, -1, self.weight_channels, 9, height * width)
        dynamic = (weights * values).sum(3).view(size, channels, height, width)
        dynamic = F.silu(self.bn(dynamic))
        share = self.se((dynamic + static).mean((2, 3), keepdim=True))
        share = share.view(size, channels, 2, 1, 1).softmax(2)
        return dynamic * share[:, :, 0] + static * share[:, :, 1]


class Bottleneck(nn.Module):
    """Residual bottleneck with a CoT block."""

    def __init__(self, channels: int, width: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(3, 2, padding=1) if stride > 1 else nn.Identity()
        self.conv2 = CoT(width)
        self.conv3 = nn.Conv2d(width, features, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(features)
        self.downsample = nn.Identity()
        if stride > 1 or channels != features:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.conv2(self.pool(y))))
        return F.relu(y + self.downsample(x))


class TorchCoTNet(nn.Module):
    """An image classifier [N, 3, H, W] -> [N, classes].

    Args:
      name: "cotnet50" or "cotnet101".
    """

    def __init__(self, name: str, num_classes: int = 1000):
        super().__init__()
        variant = get_variant(name)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = 64
        for stage, count in enumerate(variant.blocks):
            width = variant.planes[stage]
            blocks = []
            for index in range(count):
                stride = variant.strides[stage] if index == 0 else 1
                blocks.append(Bottleneck(channels, width, width * EXPANSION, stride))
                channels = width * EXPANSION
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))
