"""Draw images from a run, a checkpoint, a converted one or a DiTPipeline folder; the defaults are the paper's.

    python scripts/sample.py --ckpt DiT_XL_2_256 --class-labels "golden retriever" 88
    python scripts/sample.py --ckpt results --vae mse --sampler dpm-solver++ --num-inference-steps 25
    python scripts/sample.py -c configs/sample-dit-xl-2-256.yaml --ckpt results --vae ema
    python scripts/sample.py --again outputs/samples/000003.png

Writes a labelled grid, one PNG per image, and samples.json with everything needed to draw them again; each PNG says the
same of itself.
"""

from paddle_dit import runtime
from paddle_dit.errors import entry_point
from paddle_dit.sampling.again import parse_sample


@entry_point
def main() -> None:
    """Draw and write."""
    options, former = parse_sample(description=__doc__)
    runtime.prepare()
    from paddle_dit.sampling.few import draw_few

    draw_few(options, former)


if __name__ == "__main__":
    main()
