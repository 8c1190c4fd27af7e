"""Diffusion transformers (DiT) on PaddlePaddle.

Importing this package imports nothing heavy; Paddle is loaded when a name that needs it is first used::

    from paddle_dit import DiT, DiTConfig
    model = DiT(DiTConfig.from_preset("DiT-S/4"))
    model = DiT.from_pretrained("DiT-XL-2-256x256.pt")
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {
    "DiTConfig": "paddle_dit.config",
    "DiT": "paddle_dit.conversion.pretrained",
    "GaussianDiffusion": "paddle_dit.diffusion.objective",
    "PackedStore": "paddle_dit.data.store",
    "generate_latents": "paddle_dit.generation",
}

__all__ = sorted([*_LAZY, "__version__"])


def __getattr__(name: str):
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
