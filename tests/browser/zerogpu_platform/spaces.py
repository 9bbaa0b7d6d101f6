"""Stands for the package of Hugging Face's ZeroGPU: lends a "GPU" to each call, or none when the prompt says so."""

from __future__ import annotations


def GPU(duration):  # noqa: N802
    """The decorator around a generator; refuses as the platform does, with an exception in the event."""

    def decorate(function):
        def lent(index, prompt, noise_scale):
            if "quota" in prompt:
                raise RuntimeError(f"You have exceeded your GPU quota ({duration}s requested vs. 0s left).")
            yield from function(index, prompt, noise_scale)

        return lent

    return decorate
