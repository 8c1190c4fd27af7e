"""Exponential moving average of the weights, in float32."""

import paddle


class ExponentialMovingAverage:
    """Shadow weights: ``shadow <- decay * shadow + (1 - decay) * weights`` after every update.

    Sampling uses the shadow, as the paper does (section 4: decay 0.9999, constant from the first step).

    Attributes:
        shadow: structured name -> float32 tensor.
    """

    def __init__(self, model, decay: float = 0.9999):
        self.decay = decay
        self._weights = dict(model.named_parameters())
        self.shadow = {name: weight.detach().astype("float32").clone() for name, weight in self._weights.items()}

    @paddle.no_grad()
    def update(self) -> None:
        """Move the shadow towards the model's present weights."""
        for name, weight in self._weights.items():
            weight = weight if weight.dtype == paddle.float32 else weight.astype("float32")
            self.shadow[name].lerp_(weight, 1.0 - self.decay)
