"""Images as files: a few for people to look at, or tens of thousands for evaluation, each with how it was drawn."""
