"""Engines: a model exported once, proven equal, and run fast; with ONNX Runtime even where there is no Paddle.

from paddle_dit.deploy import InferencePipeline
pipe = InferencePipeline.from_pretrained("deploy/DiT_XL_2_256")
image = pipe(class_labels=["golden retriever"], num_inference_steps=25, guidance_scale=4.0, seed=0).images[0]
"""

from paddle_dit.deploy.pipeline import InferencePipeline

__all__ = ["InferencePipeline"]
