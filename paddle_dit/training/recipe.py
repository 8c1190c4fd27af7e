"""Everything that ``train.py`` can be told. The defaults are the DiT paper's recipe."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from paddle_dit.config import PRESETS, DiTConfig, Dtype, Weights
from paddle_dit.diffusion.options import Sampler
from paddle_dit.diffusion.schedule import NUM_TRAIN_TIMESTEPS
from paddle_dit.errors import ConfigError, nearest
from paddle_dit.randomness import MAX_SEED
from paddle_dit.runtime import sees_gpu
from paddle_dit.training.drawn_options import check_drawn

AmpLevel = Literal["O1", "O2"]
Sharding = Literal["none", "stage1", "stage2", "stage3"]
EvalFeatures = Literal["inception", "digits"]
DEFAULT_MODEL = "DiT-XL/2"
PLANNING = ("dry_run", "cards", "gpu", "assume_mfu", "assume_tflops")  # options of the dry run alone
_POSITIVE = (
    "global_batch_size",
    "accumulation",
    "epochs",
    "log_every",
    "ckpt_every",
    "held_out_samples",
    "num_inference_steps",
    "tensor_parallel_degree",
)
_CHOICES = (
    ("precision", Dtype),
    ("amp_level", AmpLevel),
    ("sharding", Sharding),
    ("init_weights", Weights),
    ("eval_sampler", Sampler),
    ("eval_features", EvalFeatures),
)
_LARGEST = 2**62  # steps and samples are counted in int64
_NOT_NEGATIVE = (
    "warmup_steps",
    "num_workers",
    "recompute",
    "global_seed",
    "num_classes",
    "max_skipped_steps",
    "eval_every",
)


@dataclass
class TrainRecipe:
    """Options of the custom training loop."""

    config: Annotated[Path | None, arg(aliases=["-c"])] = None
    """YAML file of the options below; the command line overrides it."""
    model: str | None = None
    """Preset (DiT-S/4, DiT-B/2, DiT-XL/2, ... or DiT-Digits/2), whose latents' shape and classes come from the data; or
    a JSON file of DiTConfig's fields, which the data must fit. Default: --init-from's, or DiT-XL/2."""
    init_from: str | None = None
    """Start from these weights, averaged weights included: a run, a checkpoint, a file or folder of any format that can
    be read, or a hub name. A run in --output-dir is continued instead. Classes of the same name keep their rows of the
    label table, new ones start from the null row."""
    init_weights: Weights = "ema"
    """Which weights of --init-from, where it has both: the averaged ones, or those that were trained."""
    reset_labels: bool = False
    """With --init-from: draw the rows of all classes afresh; the null row stays."""
    resize_patch: bool = False
    """With --init-from and a --model of another patch size: resample the projections of the patches."""
    train_only: tuple[str, ...] = ()
    """With --init-from: train only the parameters whose names match one of these patterns ('*bias*' 'y_embedder*'
    'final_layer*'); the others stay as they are, without gradients and optimizer state."""
    feature_path: tuple[Path, ...] = (Path("data/fastdit_imagenet256"),)
    """Latents: a packed store, or a folder holding *_features and *_labels. Several are joined: they must have the same
    shape and classes."""
    data_path: Path | None = None
    """Train straight from images instead, encoded by --vae in each step: a folder of images per class, or one with a
    labels.csv. Each image is mirrored or not by chance."""
    class_subset: tuple[str, ...] = ()
    """Train on these classes only: ids or names. They keep their names but are renumbered from 0 in the order of their
    ids, and the model has as many classes. Default: all."""
    output_dir: Annotated[Path, arg(aliases=["--results-dir"])] = Path("results")
    """Checkpoints and logs go here. The same command again continues the run found here."""
    image_size: int | None = None
    """Pixels of the images behind the latents (256, 512); checked against the data. Default: what the data says; with
    --data-path 256, to which the images are cropped."""
    num_classes: int | None = None
    """Number of classes. Default: what the data says, or 1000 where it says nothing; 0 is unconditional."""
    learn_sigma: bool = True
    """Predict the variance too (the paper's hybrid loss)."""
    class_dropout_prob: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    global_batch_size: int = 256
    """Samples per update, over all ranks."""
    accumulation: int = 1
    """Micro-batches that each rank's share is cut into."""
    epochs: float = 1400
    """Passes over the data, unless --max-steps ends the run first."""
    max_steps: int | None = None
    """Updates to make; overrides --epochs."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine fall to 0 at the last step."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    max_grad_norm: float = -1.0
    """Clip the gradient's global norm here; -1 does not clip."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights."""
    ema_warmup: bool = False
    """Begin with a smaller decay, (1 + step) / (10 + step), for short runs."""
    precision: Dtype = "fp32"
    """fp32, or on a GPU bf16 or fp16 (with dynamic loss scaling); these were not run on a GPU yet."""
    amp_level: AmpLevel = "O1"
    """O1 keeps the weights in float32; O2 narrows them, with float32 master weights."""
    recompute: int = 0
    """Recompute every k-th block in the backward pass instead of keeping its activations; 1 is all, 0 none."""
    sharding: Sharding = "none"
    """On GPUs, spread the optimizer's state over the ranks (stage1), the gradients too (stage2), the weights too
    (stage3): Paddle's group_sharded_parallel. Not run on a GPU yet."""
    tensor_parallel_degree: int = 1
    """Ranks that share every block's matrices; the others hold other samples."""
    global_seed: int = 0
    """Seed of the weights, the order of the data and every random draw."""
    num_workers: int = 4
    """Threads that read ahead, with --data-path each with a process that decodes images; 0 reads in the training
    thread."""
    log_every: int = 100
    """Steps between two lines of the log."""
    logging_dir: Path | None = None
    """Folder of VisualDL's files. Default: visualdl/ in --output-dir."""
    visualdl: bool = True
    """Write for VisualDL; log.jsonl and the preview PNGs are written in any case."""
    progress_bar: bool = True
    """Show a progress bar."""
    ckpt_every: int = 50_000
    """Steps between two checkpoints; the last step is always saved."""
    save_total_limit: int | None = None
    """Checkpoints to keep, the newest; all by default."""
    keep_every: int | None = None
    """With --save-total-limit: keep besides, for good, those whose step is a multiple of this."""
    async_save: bool = field(default_factory=sees_gpu)
    """Write checkpoints in the background, from copies in main memory. Default: where there is a GPU."""
    max_skipped_steps: int = 0
    """Steps that may be skipped because a loss is not finite, before the run stops."""
    eval_steps: int = -1
    """Steps between two losses on held-out samples, for the weights and their average; -1 never."""
    held_out_samples: int = 1024
    """Samples to hold out for that: they are taken out of the training data, unless --eval-path has them."""
    eval_path: Path | None = None
    """Held-out data of their own: latents in the form of --feature-path, or images in that of --data-path."""
    eval_every: int = 0
    """Steps between two evaluations of drawn images: FID, sFID, Inception Score, precision and recall; 0 never."""
    eval_samples: int = 1000
    """Images to draw for that, by the averaged weights, on all ranks; classes at random."""
    eval_reference: Path | None = None
    """Real images to compare them with, or their statistics: a folder or .npz, as scripts/evaluate.py takes it. What
    are images is measured anew at each start, statistics (its --save-stats) are just read."""
    eval_features: EvalFeatures = "inception"
    """inception, or for handwritten digits digits, with which --eval-reference may be digits-train or
    digits-heldout."""
    inception: Path | None = None
    """Inception's weights. Default: the public file in $PADDLE_DIT_CACHE or ~/.cache/paddle_dit, downloaded once."""
    eval_sampler: Sampler = "ddim"
    """Sampler of these images. The paper's figures are of ddpm with 250 steps: five times the time."""
    eval_inference_steps: int = 50
    """Its steps."""
    eval_guidance_scale: float = 1.0
    """Guidance of these images; 1 is none, as where the paper compares models, and takes half the time."""
    image_logging_steps: int = 5000
    """Steps between two sets of preview images, drawn by the averaged weights; -1 never."""
    num_inference_steps: int = 25
    """DDIM steps of the previews."""
    guidance_scales: tuple[float, ...] = (1.0, 4.0)
    """Guidance of the previews, a row of images each."""
    vae_name_or_path: Annotated[str | None, arg(aliases=["--vae"])] = None
    """VAE that decodes the previews, and with --data-path encodes the images: a folder or hub name. Default: the one
    that the data names."""
    resume: bool = True
    """Continue from the newest whole checkpoint in --output-dir; --no-resume moves what is there aside."""
    resume_from_checkpoint: Path | None = None
    """Continue from this checkpoint instead; newer ones in --output-dir are moved aside."""
    allow_changes: bool = False
    """Continue even with other data, seed, batch or model settings than the checkpoint's; its weights must fit."""
    deterministic: bool = False
    """On a GPU, use only kernels that give the same bits each time, more slowly; the CPU's do anyway. Not run on a GPU
    yet."""
    dry_run: bool = False
    """Print the resolved recipe, its memory and its time, and stop; nothing is written and no data needed."""
    cards: int | None = None
    """Of the dry run: ranks to plan for. Default: the ranks that were launched."""
    gpu: str = "H100"
    """Of the dry run: the card whose peak is assumed; see its error for the known ones."""
    assume_mfu: float = 0.4
    """Of the dry run: share of the card's peak that is reached."""
    assume_tflops: float | None = None
    """Of the dry run: TFLOP/s per card, instead of --gpu and --assume-mfu."""

    def __post_init__(self) -> None:
        if isinstance(self.feature_path, str | Path):
            self.feature_path = (Path(self.feature_path),)
        if self.model is None and self.init_from is None:
            self.model = DEFAULT_MODEL

    def check(self) -> None:
        """Refuse values that no run could use.

        Raises:
            ConfigError: naming the first such value.
        """
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not abs(number) <= _LARGEST:  # NaN is refused too
                    raise ConfigError(f"--{name.replace('_', '-')} must be finite and at most 2**62, got {number}")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")
        for name in ("eval_steps", "image_logging_steps"):
            if getattr(self, name) != -1 and getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, or -1 for never")
        for name in ("max_steps", "save_total_limit", "keep_every", "cards"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        if self.keep_every is not None and self.save_total_limit is None:
            raise ConfigError("--keep-every is only used with --save-total-limit N, without which all are kept")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"--ema-decay must be in [0, 1), got {self.ema_decay}")
        if self.global_seed > MAX_SEED:
            raise ConfigError(f"--global-seed must be {MAX_SEED} or less, got {self.global_seed}")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ConfigError(f"--adam-betas must be in [0, 1), got {self.adam_betas}")
        self._check_data()
        self._check_initial()
        if not self.resume and self.resume_from_checkpoint is not None:
            raise ConfigError("--no-resume and --resume-from-checkpoint contradict each other; choose one")
        if self.eval_path is not None and self.eval_steps == -1:
            raise ConfigError("--eval-path is only used with --eval-steps N; give that too")
        for name, choices in _CHOICES:
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise ConfigError(f"--{name.replace('_', '-')} must be one of {known}, got {getattr(self, name)!r}")
        check_drawn(self)
        if not self.guidance_scales or min(self.guidance_scales) < 1:
            raise ConfigError(f"--guidance-scales must be 1 (none) or more, got {self.guidance_scales}")
        if self.num_inference_steps > NUM_TRAIN_TIMESTEPS:
            raise ConfigError(
                f"--num-inference-steps must be 1 to {NUM_TRAIN_TIMESTEPS}, got {self.num_inference_steps}"
            )
        if self.assume_tflops is not None and not self.assume_tflops > 0:
            raise ConfigError(f"--assume-tflops must be positive, got {self.assume_tflops}")
        if self.sharding != "none" and self.tensor_parallel_degree > 1:
            raise ConfigError("--sharding and --tensor-parallel-degree cannot be combined; choose one")
        if self.precision == "fp16" and self.tensor_parallel_degree > 1:
            raise ConfigError("--precision fp16 cannot be combined with --tensor-parallel-degree; use bf16")
        if not 0 < self.assume_mfu <= 1:
            raise ConfigError(f"--assume-mfu must be in (0, 1], got {self.assume_mfu}")
        if not self.learning_rate > 0:
            raise ConfigError(f"--learning-rate must be positive, got {self.learning_rate}")

    def _check_data(self) -> None:
        if not self.feature_path:
            raise ConfigError("--feature-path names no folder; give one or more")
        if self.data_path is None:
            return
        if self.feature_path != TrainRecipe.feature_path:
            raise ConfigError("--data-path (images) and --feature-path (latents) contradict each other; choose one")
        if self.vae_name_or_path is None:
            raise ConfigError("--data-path needs the VAE that encodes the images; give --vae FOLDER or a hub name")
        if self.image_size is not None and self.image_size < 1:
            raise ConfigError(f"--image-size must be 1 or more, got {self.image_size}")

    def _check_initial(self) -> None:
        for name in ("reset_labels", "resize_patch", "train_only"):
            if getattr(self, name) and self.init_from is None:
                raise ConfigError(f"--{name.replace('_', '-')} is only used with --init-from; give that too")
        if self.train_only and self.sharding != "none":
            raise ConfigError(
                "--train-only leaves little state to spread and was not made for --sharding; leave --sharding out"
            )

    def share_of_batch(self, world_size: int) -> int:
        """Return the samples of a global batch that one of ``world_size`` ranks takes.

        Raises:
            ConfigError: the batch does not divide, or the ranks do not.
        """
        degree = self.tensor_parallel_degree
        if world_size % degree:
            raise ConfigError(
                f"--tensor-parallel-degree {degree} does not divide the {world_size} launched ranks;"
                f" launch a multiple of {degree} (--nproc_per_node)"
            )
        shares = world_size // degree
        if self.global_batch_size % (shares * self.accumulation):
            raise ConfigError(
                f"--global-batch-size {self.global_batch_size} is not divisible by {shares} ranks"
                f" x {self.accumulation} micro-batches; use a multiple of {shares * self.accumulation}"
            )
        return self.global_batch_size // shares

    @property
    def is_preset(self) -> bool:
        """Whether the data decide the latents' shape and the classes: ``--model`` is no JSON file."""
        return self.model is None or self.model in PRESETS

    def base_config(self) -> DiTConfig:
        """Return the architecture that ``--model`` names, before the data's shape and classes are known."""
        own = {"learn_sigma": self.learn_sigma, "class_dropout_prob": self.class_dropout_prob}
        if self.is_preset:
            return DiTConfig.from_preset(self.model, **own)
        if self.model.endswith(".json"):
            if any(value != getattr(TrainRecipe, name) for name, value in own.items()):
                raise ConfigError(f"{self.model} decides learn_sigma and class_dropout_prob; change them there")
            return DiTConfig.load(self.model)
        raise ConfigError(f"unknown model '{self.model}'.{nearest(self.model, PRESETS)} Known: {', '.join(PRESETS)}")

    @property
    def visualdl_folder(self) -> Path | None:
        """Where VisualDL's files go, if anywhere."""
        return (self.logging_dir or self.output_dir / "visualdl") if self.visualdl else None

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of updates of the whole run."""
        return self.max_steps if self.max_steps is not None else int(self.epochs * steps_per_epoch)

    def to_dict(self) -> dict:
        """Return plain values for JSON; one folder of latents is a text, and no choice of classes is None."""
        values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        folders = [str(path) for path in self.feature_path]
        return values | {
            "feature_path": folders[0] if len(folders) == 1 else folders,
            "class_subset": list(self.class_subset) or None,
            "train_only": list(self.train_only) or None,
        }
