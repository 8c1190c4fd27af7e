"""From a Paddle layer to a static program, in memory or as files."""

import warnings
from pathlib import Path

import paddle

from paddle_dit.deploy.specs import ProgramSpec


def input_specs(spec: ProgramSpec) -> list[paddle.static.InputSpec]:
    """Return the inputs as Paddle describes them; a dimension with a name is of any size."""
    return [
        paddle.static.InputSpec([size if isinstance(size, int) else -1 for size in shape], dtype, name)
        for name, (dtype, shape) in spec.inputs.items()
    ]


def trace(layer: paddle.nn.Layer, spec: ProgramSpec):
    """Return a layer as a static program, to be called with tensors in the specification's order."""
    try:
        return paddle.jit.to_static(layer, input_spec=input_specs(spec), full_graph=True).forward
    finally:
        layer.__dict__.pop("forward", None)  # which to_static puts over the class' own


def save_traced(layer: paddle.nn.Layer, spec: ProgramSpec, stem: Path) -> Path:
    """Write a layer as ``<stem>.json`` and ``<stem>.pdiparams``; return the first. The layer stays as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is saved is a function, and a program has no place
        paddle.jit.save(trace(layer, spec), str(stem))
    return stem.with_name(f"{stem.name}.json")
