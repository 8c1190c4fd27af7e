"""Flags of the Trainer script: PaddleNLP's TrainingArguments, and how they read as a recipe of ``train.py``."""

import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Optional

from paddlenlp.trainer import PdArgumentParser, TrainingArguments
from paddlenlp.trainer.integrations import get_available_reporting_integrations
from paddlenlp.trainer.trainer_utils import IntervalStrategy

from paddle_dit.cli import read_recipe
from paddle_dit.errors import ConfigError, PaddleDiTError, nearest
from paddle_dit.runtime import sees_gpu
from paddle_dit.training.plan import Plan
from paddle_dit.training.recipe import TrainRecipe


def _option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class DiTTrainingArguments(TrainingArguments):
    """PaddleNLP's TrainingArguments with the paper's recipe as defaults, and what a DiT needs besides."""

    output_dir: str = _option("results", "Checkpoints, logs and pictures. The same command again continues the run.")
    learning_rate: float = _option(1e-4, "Peak learning rate of AdamW.")
    lr_scheduler_type: str = _option("constant", "constant, linear, cosine or polynomial; each after --warmup_steps.")
    logging_steps: int = _option(100, "Steps between two lines of the log.")
    save_steps: int = _option(50_000, "Steps between two checkpoints; the last step is always saved.")
    per_device_train_batch_size: int = _option(32, "Samples that a card takes through the model at once.")
    num_train_epochs: float = _option(1400.0, "Passes over the data, unless --max_steps ends the run first.")
    max_grad_norm: float = _option(-1.0, "Clip the gradient's global norm here; -1 does not clip.")
    dataloader_num_workers: int = _option(4, "Threads that read ahead, of images with a process each; 0: none.")
    seed: int = _option(0, "Of the weights, the order of the data and every random draw.")

    model_name_or_config: Optional[str] = _option(None, "Preset or JSON file; default: --init_from's, or DiT-XL/2.")  # noqa: UP045
    init_from: Optional[str] = _option(None, "Start from these weights: a run, a file, a folder, a hub name.")  # noqa: UP045
    init_weights: str = _option("ema", "Which weights of --init_from, where it has both: ema or model.")
    reset_labels: bool = _option(False, "With --init_from: draw the rows of all classes afresh.")
    resize_patch: bool = _option(False, "With --init_from and another patch size: resample the projections.")
    train_only: list[str] = field(
        default_factory=list,
        metadata={"help": "With --init_from: patterns of the parameters that train ('*bias*'); the others are frozen."},
    )
    feature_path: list[str] = field(
        default_factory=lambda: ["data/fastdit_imagenet256"],
        metadata={"help": "Packed store, or folder with *_features and *_labels; several are joined."},
    )
    data_path: Optional[str] = _option(None, "Train straight from images instead, which the VAE encodes in each step.")  # noqa: UP045
    class_subset: list[str] = field(
        default_factory=list,
        metadata={"help": "Train on these classes only, ids or names, renumbered from 0 in the order of their ids."},
    )
    image_size: Optional[int] = _option(None, "Pixels of the images, of latents those behind them; checked then.")  # noqa: UP045
    num_classes: Optional[int] = _option(None, "Number of classes; by default what the data says.")  # noqa: UP045
    learn_sigma: bool = _option(True, "Predict the variance too.")
    class_dropout_prob: float = _option(0.1, "Share of labels replaced by the null class.")
    ema_decay: float = _option(0.9999, "Decay of the averaged weights.")
    ema_warmup: bool = _option(False, "Begin with a smaller decay, for short runs.")
    recompute_every: int = _option(1, "With --recompute: recompute every k-th block only.")
    keep_every: Optional[int] = _option(None, "With --save_total_limit: keep also the steps divisible by this.")  # noqa: UP045
    async_save: Optional[bool] = _option(None, "Save in the background: true or false; default: on a GPU.")  # noqa: UP045
    allow_changes: bool = _option(False, "Continue even with other data, seed, batch or model settings.")
    deterministic: bool = _option(False, "On a GPU, use only kernels that give the same bits each time.")
    max_skipped_steps: int = _option(0, "Steps that may be skipped because a loss is not finite.")
    held_out_samples: int = _option(1024, "Samples held out for --eval_steps, unless --eval_path has them.")
    eval_path: Optional[str] = _option(None, "Held-out latents, or images, of their own.")  # noqa: UP045
    eval_every: int = _option(0, "Steps between two evaluations of drawn images (FID and others); 0 never.")
    eval_samples: int = _option(1000, "Images that the averaged weights draw for --eval_every.")
    eval_reference: Optional[str] = _option(None, "Real images to compare with: folder, .npz, statistics.")  # noqa: UP045
    eval_features: str = _option("inception", "inception, or digits, of which --eval_reference may be digits-train.")
    inception: Optional[str] = _option(None, "Inception's weights; default: the cached file, downloaded once.")  # noqa: UP045
    eval_sampler: str = _option("ddim", "Sampler of --eval_every: ddpm, ddim or dpm-solver++.")
    eval_inference_steps: int = _option(50, "Its steps.")
    eval_guidance_scale: float = _option(1.0, "Its guidance; 1 is none.")
    image_logging_steps: int = _option(5000, "Steps between two sets of preview images; -1 never.")
    num_inference_steps: int = _option(25, "DDIM steps of the previews.")
    guidance_scales: list[float] = field(
        default_factory=lambda: [1.0, 4.0], metadata={"help": "Guidance of the previews, a row of images each."}
    )
    vae_name_or_path: Optional[str] = _option(None, "VAE of the previews and of --data_path; default: the data's.")  # noqa: UP045
    dry_run: bool = _option(False, "Print the resolved recipe, its memory and its time, and stop.")
    cards: Optional[int] = _option(None, "Of the dry run: ranks to plan for.")  # noqa: UP045
    gpu: str = _option("H100", "Of the dry run: the card whose peak is assumed.")
    assume_mfu: float = _option(0.4, "Of the dry run: share of that peak that is reached.")
    assume_tflops: Optional[float] = _option(None, "Of the dry run: TFLOP/s per card instead.")  # noqa: UP045

    def __post_init__(self):
        self._refuse_what_is_not_offered()
        # Taken over by the session; the Trainer's own ways of doing these would come on top.
        self.precision = "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"
        self.zero_stage, self.wants_recompute = self.sharding or "none", self.recompute
        self.visualdl_dir = self.logging_dir
        self.fp16 = self.bf16 = self.recompute = False
        self.sharding = ""
        if self.warmup_steps == 0 and self.max_steps > 0:
            self.warmup_steps = int(self.warmup_ratio * self.max_steps)
        if self.lr_scheduler_type == "constant" and (self.warmup_steps > 0 or self.warmup_ratio > 0):
            self.lr_scheduler_type = "constant_with_warmup"  # the Trainer's "constant" would drop the warm-up
        self.report_to = self.report_to or "visualdl"
        if self.eval_steps and self.evaluation_strategy == "no":
            self.evaluation_strategy = "steps"
        try:
            super().__post_init__()
        except (ValueError, AssertionError) as error:
            raise ConfigError(str(error) or "PaddleNLP's TrainingArguments cannot use one of these values") from error

    def _refuse_what_is_not_offered(self) -> None:
        if self.fp16 and self.bf16:
            raise ConfigError("--fp16 and --bf16 contradict each other; choose one")
        if self.tensor_parallel_degree > 1:
            raise ConfigError(
                "--tensor_parallel_degree of the Trainer needs layers that a DiT has not got; use train.py "
                "--tensor-parallel-degree"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"--warmup_ratio must be in [0, 1], got {self.warmup_ratio}")
        if self.recompute_every < 1:
            raise ConfigError(f"--recompute_every must be 1 or more, got {self.recompute_every}")
        if self.sharding not in ("", "stage1", "stage2", "stage3"):
            raise ConfigError(f"--sharding must be stage1, stage2 or stage3, got '{self.sharding}'")
        for name in _NOT_OFFERED:
            default = next(option.default for option in fields(TrainingArguments) if option.name == name)
            if getattr(self, name) != default:
                raise ConfigError(f"--{name} is not offered for a DiT; leave it out")

    def recipe(self) -> TrainRecipe:
        """Return what ``train.py`` would be told for the same run."""
        of_same_name = {option.name for option in fields(TrainRecipe)} & {option.name for option in fields(self)}
        values = {name: getattr(self, name) for name in of_same_name}
        values["output_dir"] = Path(self.output_dir)
        return TrainRecipe(**values | self._translated())

    def _translated(self) -> dict:
        """Return the options that ``train.py`` has under other names."""
        ranks = (self.cards if self.dry_run else None) or self.world_size
        explicit = self.resume_from_checkpoint not in (None, "", "last", "true", "True")
        return {
            "model": self.model_name_or_config,
            "async_save": sees_gpu() if self.async_save is None else self.async_save,
            "eval_path": Path(self.eval_path) if self.eval_path else None,
            "eval_reference": Path(self.eval_reference) if self.eval_reference else None,
            "inception": Path(self.inception) if self.inception else None,
            "feature_path": tuple(map(Path, self.feature_path)),
            "data_path": Path(self.data_path) if self.data_path else None,
            "class_subset": tuple(self.class_subset),
            "train_only": tuple(self.train_only),
            "guidance_scales": tuple(self.guidance_scales),
            "global_batch_size": self.per_device_train_batch_size * self.gradient_accumulation_steps * ranks,
            "accumulation": self.gradient_accumulation_steps,
            "epochs": self.num_train_epochs,
            "max_steps": self.max_steps if self.max_steps > 0 else None,
            "lr_schedule": self.lr_scheduler_type.value.removesuffix("_with_warmup"),
            "adam_betas": (self.adam_beta1, self.adam_beta2),
            "precision": self.precision,
            "amp_level": self.fp16_opt_level,
            "recompute": self.recompute_every if self.wants_recompute else 0,
            "sharding": self.zero_stage,
            "tensor_parallel_degree": 1,
            "global_seed": self.seed,
            "num_workers": self.dataloader_num_workers,
            "log_every": self.logging_steps,
            "ckpt_every": self.save_steps,
            "logging_dir": Path(self.visualdl_dir) if self.visualdl_dir else None,
            "visualdl": "visualdl" in self.report_to,
            "progress_bar": not self.disable_tqdm,
            "eval_steps": (self.eval_steps or 1) if self.do_eval else -1,  # by epochs, settle() will know
            "resume": not self.overwrite_output_dir,
            "resume_from_checkpoint": Path(self.resume_from_checkpoint) if explicit else None,
        }

    def settle(self, plan: Plan) -> None:
        """Tell the Trainer's loop the steps that epochs come to: it sees an endless stream of whole batches."""
        self.max_steps = plan.total_steps
        self.per_device_train_batch_size *= self.gradient_accumulation_steps
        self.gradient_accumulation_steps = 1  # the session cuts a batch into micro-batches itself
        for strategy, steps in (
            ("logging_strategy", "logging_steps"),
            ("save_strategy", "save_steps"),
            ("evaluation_strategy", "eval_steps"),
        ):
            if getattr(self, strategy) == IntervalStrategy.EPOCH:
                setattr(self, strategy, IntervalStrategy.STEPS)
                setattr(self, steps, plan.order.steps_per_epoch)


_NOT_OFFERED = (  # flags that would be ignored, because the session has its own way or none
    "pipeline_parallel_degree",
    "sep_parallel_degree",
    "context_parallel_degree",
    "expert_parallel_degree",
    "load_best_model_at_end",
    "to_static",
    "optim",
    "adam_epsilon",
    "amp_master_grad",
    "enable_auto_parallel",
    "unified_checkpoint",
    "use_async_save",
    "offload_optim",
    "skip_data_intervals",
    "count_trained_tokens",
    "max_evaluate_steps",
    "sharding_degree",
    "ignore_data_skip",
    "ignore_save_lr_and_optim",
    "ignore_load_lr_and_optim",
    "minimum_eval_times",
    "per_device_eval_batch_size",
    "scale_loss",
    "amp_custom_black_list",
    "amp_custom_white_list",
    "sharding_parallel_degree",
    "sharding_parallel_config",
    "fp16_full_eval",
    "bf16_full_eval",
)


def parse_arguments(argv: Sequence[str] | None = None, *, description: str) -> DiTTrainingArguments:
    """Read the command line; a YAML or JSON recipe may stand first, and flags override it.

    Raises:
        ConfigError: an unknown flag (the nearest is named), a wrong value, or flags that contradict each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = [*_as_flags(Path(argv[0])), *argv[1:]]
    usage = "%(prog)s [recipe.yaml] --do_train [FLAGS]; FLAGS are PaddleNLP's, and at their end those of a DiT"
    parser = _Parser(
        DiTTrainingArguments, usage=usage, description=description, formatter_class=_Help, allow_abbrev=False
    )
    argv = [_with_underscores(token) for token in argv]
    arguments, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
    if unknown:
        known = [option.name for option in fields(DiTTrainingArguments)]
        if unknown[0].endswith((".yaml", ".yml", ".json")):
            raise ConfigError(f"a recipe must stand first on the command line: {unknown[0]}")
        hint = nearest(unknown[0].lstrip("-"), known)
        raise ConfigError(f"unknown option '{unknown[0]}'.{hint} See --help for the whole list.")
    missing = [name for name in arguments.report_to if name not in get_available_reporting_integrations()]
    if missing:
        raise ConfigError(f"--report_to {missing[0]}: not installed; install it, or use --report_to visualdl or none")
    return arguments


@contextmanager
def trainer_flag_names() -> Iterator[None]:
    """Let errors within the block name flags as the Trainer does: the session knows those of ``train.py``."""
    try:
        yield
    except PaddleDiTError as error:
        text = str(error).replace("--precision ", "--")
        text = re.sub(r"--[a-z][a-z-]*", lambda flag: _NAMES.get(flag[0], _with_underscores(flag[0])), text)
        raise PaddleDiTError(text) from error


_NAMES = {  # of train.py -> of the Trainer; all others differ in the hyphens alone
    "--model": "--model_name_or_config",
    "--global-batch-size": "--per_device_train_batch_size",
    "--accumulation": "--gradient_accumulation_steps",
    "--epochs": "--num_train_epochs",
    "--global-seed": "--seed",
    "--lr-schedule": "--lr_scheduler_type",
    "--amp-level": "--fp16_opt_level",
    "--visualdl": "--report_to",
    "--progress-bar": "--disable_tqdm",
    "--num-workers": "--dataloader_num_workers",
    "--log-every": "--logging_steps",
    "--ckpt-every": "--save_steps",
    "--adam-betas": "--adam_beta1 and --adam_beta2",
    "--no-resume": "--overwrite_output_dir",
    "--vae": "--vae_name_or_path",
}


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it was written."""


class _Parser(PdArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{message}. See --help.")


def _as_flags(recipe: Path) -> list[str]:
    flags = []
    for name, value in read_recipe(recipe, {option.name for option in fields(DiTTrainingArguments)}).items():
        if value is not None:
            flags += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def _with_underscores(token: str) -> str:
    name, equals, value = token.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else token
