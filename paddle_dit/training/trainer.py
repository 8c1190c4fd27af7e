"""The same training on PaddleNLP's Trainer: its flags, its callbacks and its loop say when, the session does the work.

The Trainer's own wrapping, autocast, saving and resuming are replaced, since they save no averaged weights, write
checkpoints in place, keep the optimizer's state under generated names and read all earlier data again to resume.
"""

import itertools
from collections.abc import Iterator

import paddle
from paddlenlp.trainer import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from paddlenlp.trainer.integrations import VisualDLCallback
from paddlenlp.trainer.trainer_utils import IntervalStrategy
from paddlenlp.utils.log import logger

from paddle_dit.training.session import Session
from paddle_dit.training.trainer_arguments import DiTTrainingArguments


class _WholeUpdate:
    """What the Trainer takes for the optimizer: its step ends the session's step, averaging and EMA included."""

    def __init__(self, session: Session):
        self._session, self.losses = session, None

    def step(self) -> None:
        self._session.update(self.losses)

    def clear_grad(self, set_to_zero: bool = True) -> None:
        """Do nothing: the update has done it."""

    def __getattr__(self, name: str):
        return getattr(self._session.optimizer, name)


class _SessionCallback(TrainerCallback):
    """Draws, keeps the epoch right on a stream without epochs, and ends the last step as ``train.py`` does."""

    def __init__(self, session: Session):
        self.session = session

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / self.session.plan.order.steps_per_epoch
        if args.image_logging_steps > 0 and state.global_step % args.image_logging_steps == 0:
            self.session.duties.draw()
        if args.eval_every > 0 and (state.global_step % args.eval_every == 0 or self.session.finished):
            self.session.duties.undone.append("measure")  # done once the checkpoint has been saved
        control.should_training_stop |= self.session.stopping
        if self.session.finished:
            control.should_log = True
            control.should_evaluate = args.evaluation_strategy != IntervalStrategy.NO
            control.should_save = args.save_strategy != IntervalStrategy.NO
        return control


class DiTTrainer(Trainer):
    """PaddleNLP's Trainer around a session; its :meth:`train` is what :meth:`Session.run` is to call."""

    def __init__(self, args: DiTTrainingArguments, session: Session):
        args.settle(session.plan)
        logger.set_level("WARNING")  # it prints every option, and figures that the session's own greeting has right
        self.session = session
        super().__init__(model=session.model, args=args, callbacks=[_SessionCallback(session)])
        for reporter in (ProgressCallback, PrinterCallback, VisualDLCallback):  # the session's monitor does it
            self.remove_callback(reporter)

    def get_train_dataloader(self) -> Iterator[int]:
        """Return a tick per step: the batch is read in :meth:`training_step`, where one rank's error reaches all."""
        return itertools.count(self.session.updates)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Take the session's optimizer, and PaddleNLP's schedule for it."""
        self.optimizer = _WholeUpdate(self.session)
        self.create_scheduler(num_training_steps)
        self.lr_scheduler.step(self.session.updates)

    def training_step(self, model, inputs, step_control: int = 0) -> paddle.Tensor:
        """Return this rank's loss of one whole batch."""
        self.session.optimizer.set_lr(self.lr_scheduler.get_lr())
        self.optimizer.losses = losses = self.session.backward()
        return paddle.zeros([]) if losses is None else losses["loss"]

    def log(self, logs: dict[str, float], **kwargs) -> None:
        """Add the session's figures, in its own log as well."""
        if "loss" in logs:
            logs |= self.session.log()
        super().log(logs, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Return the losses on held-out samples."""
        metrics = {f"eval_{name}": value for name, value in self.session.duties.evaluate().items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_training_stop |= self.session.stopping
        return metrics

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Do all that is due after a step, and last what takes longest."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.session.duties.catch_up()
        self.control.should_training_stop |= self.session.stopping

    def _save_checkpoint(self, model, metrics=None) -> None:
        self.session.save()

    def _load_from_checkpoint(self, resume_from_checkpoint=None) -> None:
        """Do nothing: the session has continued already."""

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        self.state.global_step = self.session.updates

    def _wrap_model(self, model, training: bool = True):
        return model  # gradients are averaged once per update, not by a wrapper

    def _check_loss_valid(self, loss) -> None:
        """Do nothing: the session has stopped before the gradients, where it had to."""
