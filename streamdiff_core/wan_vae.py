"""Wan2.1's VAE as a streaming VAE: diffusers' modules and weights, our memory (Stream-VAE, paper §3.4, SPEC §5.2).

Every causal convolution needs the last two frames it saw. diffusers' ``AutoencoderKLWan`` keeps them in lists that it
clears at the end of each call, and upstream keeps them on the module, one stream per VAE. Here each
stream owns its two lists (``WanVAEState``) and hands them to the same encoder and decoder, so any split of a clip gives
what the whole clip gives, for any number of streams.

StreamDiffusionV2's models read the encoder's mean as it is and write normalised latents (SPEC §5.2): with
``raw_latents`` ``encode`` returns the raw mean. ``decode`` always undoes the normalisation.

Weights come from ``weights.load_wan_vae``. They lie channels-last, which a CPU computes faster in bfloat16 and as fast
in float32 (``docs/LOG.md``); on a GPU ``choose_layout`` measures both orders when the first stream starts.

Shapes: B streams, T pixel frames, F latent frames, H x W pixels, h x w = H/8 x W/8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from streamdiff_core.attention_choice import REPEATS, time_call_ms

GROUP = 4
"""Pixel frames per latent frame after the first."""
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Name of that order in memory, by number of dimensions."""


@dataclass(slots=True)
class WanVAEState:
    """Memory of one stream: what each causal convolution saw last, in the order they run."""

    encoder: list[Any] = field(default_factory=list)
    decoder: list[Any] = field(default_factory=list)
    encoded_first: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [x for x in (*self.encoder, *self.decoder) if isinstance(x, Tensor)]
        return sum(x.numel() * x.element_size() for x in held)


class WanVAE(nn.Module):
    """``StreamingVAE`` around an ``AutoencoderKLWan``."""

    def __init__(self, autoencoder: nn.Module, *, raw_latents: bool = True) -> None:
        super().__init__()
        self.autoencoder, self.raw_latents = autoencoder, raw_latents
        self._sizes = [_num_causal_convs(part) for part in (autoencoder.encoder, autoencoder.decoder)]
        for name in ("mean", "std"):
            values = torch.tensor(getattr(autoencoder.config, f"latents_{name}"))[:, None, None, None]
            self.register_buffer(f"latents_{name}", values, persistent=False)
        self.lay_out(channels_last=True)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.autoencoder.dtype

    def new_state(self) -> WanVAEState:
        """Fresh memory for one stream."""
        encoder, decoder = self._sizes
        return WanVAEState(encoder=[None] * encoder, decoder=[None] * decoder)

    def lay_out(self, *, channels_last: bool) -> None:
        """Put the weights in this order in memory; what convolutions write follows them. Streams may go on."""
        self.channels_last = channels_last
        for weight in self.autoencoder.parameters():
            if weight.ndim in CHANNELS_LAST:
                order = CHANNELS_LAST[weight.ndim] if channels_last else torch.contiguous_format
                with torch.inference_mode(weight.is_inference()):  # weights stay the kind of tensor they are
                    weight.data = weight.data.contiguous(memory_format=order)

    @torch.inference_mode()
    def choose_layout(
        self,
        height: int,
        width: int,
        *,
        time_ms: Callable[[Callable[[], object], torch.device], float] = time_call_ms,
    ) -> None:
        """Keep the order in which one chunk of H x W pixels is encoded and decoded faster (best of five calls)."""
        device, took_ms = self.latents_mean.device, {}
        frames = torch.zeros(1, 1 + GROUP, 3, height, width, device=device)
        for channels_last in (True, False):
            self.lay_out(channels_last=channels_last)
            state = self.new_state()
            self.decode(self.encode(frames, state), state)  # the first call also lets libraries choose algorithms
            took_ms[channels_last] = min(
                time_ms(lambda s=state: self.decode(self.encode(frames[:, 1:], s), s), device) for _ in range(REPEATS)
            )
        self.lay_out(channels_last=took_ms[True] <= took_ms[False])

    def encode(self, frames: Tensor, state: WanVAEState) -> Tensor:
        """Encode the next frames of a stream.

        Args:
            frames: [B, T, 3, H, W] in [-1, 1]; T = 1 + 4n on the first call, 4n later; H and W multiples of 8.
            state: the stream's memory.

        Returns:
            Means [B, F, 16, h, w], raw or normalised, float32 or better.

        Raises:
            ValueError: a number of frames that does not make whole latent frames.
        """
        lead = 0 if state.encoded_first else 1
        if frames.shape[1] < lead or (frames.shape[1] - lead) % GROUP:
            want = "4n frames after the first call" if state.encoded_first else "1 + 4n frames first"
            raise ValueError(f"{frames.shape[1]} frames do not make whole latent frames; pass {want}")
        state.encoded_first = True
        x = frames.transpose(1, 2).to(self.dtype)  # [B, 3, T, H, W]
        groups = [x[:, :, :lead]] * lead + list(x[:, :, lead:].split(GROUP, dim=2))
        out = [self.autoencoder.encoder(g, feat_cache=state.encoder, feat_idx=[0]) for g in groups if g.shape[2]]
        mean = self.autoencoder.quant_conv(torch.cat(out, dim=2)).chunk(2, dim=1)[0]
        mean = mean.to(torch.promote_types(self.dtype, torch.float32))
        if not self.raw_latents:
            mean = (mean - self.latents_mean) / self.latents_std
        return mean.transpose(1, 2)

    def decode(self, latents: Tensor, state: WanVAEState) -> Tensor:
        """Decode the next normalised latent frames [B, F, 16, h, w] of a stream to [B, T, 3, H, W] in [-1, 1]."""
        z = latents.transpose(1, 2)  # [B, 16, F, h, w]
        z = self.autoencoder.post_quant_conv((z * self.latents_std + self.latents_mean).to(self.dtype))
        out = [self.autoencoder.decoder(f, feat_cache=state.decoder, feat_idx=[0]) for f in z.split(1, dim=2)]
        return torch.cat(out, dim=2).clamp(-1, 1).transpose(1, 2)


def _num_causal_convs(part: nn.Module) -> int:
    """Convolutions with a memory, as diffusers counts them."""
    return sum(type(module).__name__ == "WanCausalConv3d" for module in part.modules())
