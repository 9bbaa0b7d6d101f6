"""A guided filter with learned weights: decoded pictures keep their style and get the edges of the input.

A denoiser of 16-pixel tokens cannot place a line to the pixel, and what noise it leaves differs from token to token,
which shows as a grid where things move. The input frame is at hand, is aligned with the picture and has neither fault.
A few convolutions on cells of both pictures correct the decoded one; which style it is they read from the cells' mean.

Ours, not the paper's: the learned form (Wu et al., arXiv:1803.05619) of He et al.'s guided filter. Frame by frame, so
any split of a stream is equal. What it does to each style: ``docs/LOG.md``.

Shapes: T frames, H x W pixels, c x c pixels a cell, h x w = H/c x W/c cells, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CELL_PX = 4
PERIOD_PX = 16
"""Side of a token of the bundled transformer: where in it a cell lies is known to the filter."""


class GuidedFilter(nn.Module):
    """Corrects decoded pictures; the correction starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2 * 3, width, 3 * CELL_PX, stride=CELL_PX, padding=CELL_PX)  # a cell and its neighbours
        self.place = nn.Parameter(torch.zeros(PERIOD_PX // CELL_PX, PERIOD_PX // CELL_PX, width))
        self.style = nn.Linear(width, 2 * width)
        self.near = nn.Conv2d(width, width, 3, padding=1)
        self.far = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.out = nn.Conv2d(width, 3 * CELL_PX**2, 3, padding=1)
        for last in (self.style, self.out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, video: Tensor, source: Tensor) -> Tensor:
        """Pictures and the input they were made from, each [T, 3, H, W] in [-1, 1] -> pictures, not clamped.

        H and W are multiples of ``PERIOD_PX``.
        """
        dtype = self.stem.weight.dtype
        x = self._cells(torch.cat([video.to(dtype), source.to(dtype)], dim=1))  # [T, D, h, w], channels last in memory
        places = [cells // own for cells, own in zip(x.shape[2:], self.place.shape[:2], strict=True)]
        x = x.add_(self.place.repeat(*places, 1).permute(2, 0, 1))
        mean = F.silu(x).permute(0, 2, 3, 1).flatten(1, 2).mean(1)  # [T, D]
        shift, scale = self.style(mean)[..., None, None].chunk(2, dim=1)
        x = torch.addcmul(shift, x, 1 + scale)
        x = self.near(F.silu(x)).add_(x)
        x = self.far(F.silu(x)).add_(x)
        return video + F.pixel_shuffle(self.out(F.silu(x)), CELL_PX).to(video.dtype)

    def _cells(self, pictures: Tensor) -> Tensor:
        """Each cell and its neighbours, [T, 6, H, W] -> [T, D, h, w]."""
        if not torch.is_grad_enabled():
            return self.stem(pictures)
        # the same sum with cells as channels: a CPU takes seconds for the gradient of so wide a strided convolution
        kernel = self.stem.weight.unflatten(2, (3, CELL_PX)).unflatten(4, (3, CELL_PX)).permute(0, 1, 3, 5, 2, 4)
        cells = F.pixel_unshuffle(pictures, CELL_PX).contiguous(memory_format=torch.channels_last)
        return F.conv2d(cells, kernel.flatten(1, 3), self.stem.bias, padding=1)


def share_at(noise_scale: float, usual: float) -> float:
    """Share of the correction to take: all of it up to the preset's usual noise, none where noise is all there is.

    Who asks for more noise wants a picture that leaves its input; the filter would lead it back. The fourth power lets
    a little more noise already show.
    """
    return min(1.0, (1 - noise_scale) / max(1 - usual, 1e-6)) ** 4
