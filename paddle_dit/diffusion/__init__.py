"""The noising process, its objective and the samplers that invert it."""
