"""The custom training loop on ``paddle.distributed``."""

from paddle_dit.training.learning_rate import learning_rate_at
from paddle_dit.training.session import Session


def train(session: Session) -> None:
    """Train to the last step, or until a signal; log, evaluate, draw and save on the way."""
    recipe, duties, total = session.recipe, session.duties, session.plan.total_steps

    def due(every: int, *, at_the_end: bool = True) -> bool:
        return every > 0 and (session.updates % every == 0 or (at_the_end and session.finished))

    while not session.finished and not session.stopping:
        session.optimizer.set_lr(learning_rate_at(recipe, session.updates, total))
        session.update(session.backward())
        if due(recipe.log_every):
            session.log()
        if due(recipe.eval_steps):
            duties.evaluate()
        if due(recipe.image_logging_steps, at_the_end=False):
            duties.draw()
        if due(recipe.eval_every):
            duties.undone.append("measure")  # it takes long, so the checkpoint comes first, and knows of it
        if due(recipe.ckpt_every):
            session.save()
        duties.catch_up()
