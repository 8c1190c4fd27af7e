"""Draw images with an engine of scripts/export_inference.py; one of ONNX Runtime needs no Paddle.

    python scripts/infer.py --model deploy/DiT_XL_2_256 --class-labels "golden retriever" 88 --num-inference-steps 25
    python scripts/infer.py --model deploy/DiT_XL_2_256 --verify

Writes a labelled grid, one PNG per image, and samples.json with everything needed to draw them again.
"""

from paddle_dit import runtime
from paddle_dit.errors import entry_point


@entry_point
def main() -> None:
    """Draw and write, or compare."""
    # Here, so that a package that is missing where an engine was copied to is told in one line.
    from paddle_dit.cli import parse
    from paddle_dit.deploy.drawing import InferOptions, infer

    options = parse(InferOptions, description=__doc__)
    runtime.prepare()
    infer(options)


if __name__ == "__main__":
    main()
