"""A recipe: one TOML file that says what to train on which set, and the changes made to it on the command line."""

import dataclasses
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ray_jobs.names import fingerprint, first_fingerprint
from tavlad.config import STAGE1, STAGE2, CodebookConfig, FeatureConfig, ModelConfig, StageConfig, TrainingConfig, parse
from tavlad.errors import UserError
from tavlad.parallel import quick_precision

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceConfig:
    """What a training asks of the cluster. Does not change what it computes, up to the order of float32 sums."""

    workers: int | str = 1
    """Ranks that share each batch; or "2-8": as many of them as there is room for, fewer when nodes are lost, more when
    they come back."""
    resize_seconds: float = 60.0
    """Seconds between two looks whether there is room for more workers, with "2-8"."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """On few nodes or on many; strict: on one node, or one a node, or not at all."""
    reduce: Literal["ddp", "deterministic"] = "ddp"
    """How gradients are added up: by DDP, while they are computed; or in a fixed order, to the same bits for any number
    of workers up to `virtual_ranks` (with the same processors and cpus_per_worker)."""
    virtual_ranks: int = 8
    """Parts that "deterministic" cuts a batch into. Another number is another order of the sums."""
    gpus_per_worker: float = 0.0
    """GPUs of one worker; 0 trains on the CPU."""
    cpus_per_worker: float = 1.0
    """CPUs of one worker."""
    memory_per_worker: float = 0.0
    """GB of memory that one worker reserves; 0 reserves none."""
    loader_threads: int = 0
    """Threads of one worker that fetch, decode and crop clips. 0: as many as measured rates ask for, within the node's
    processors."""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """What makes the views of packed clips in training on a GPU, to the same pixels: auto: the GPU, if the worker's
    processors cannot keep up with it and the clips, decoded once, all fit in half of its free memory; gpu: the GPU
    wherever they fit. `training.decoder` has a quicker way, to other pixels."""
    prefetch_batches: int = 4
    """Batches read ahead of the training step."""
    disk_cache: float = 50.0
    """GB that each node's cache of packed clips may take, for all trainings there together; 0 for no cache."""
    checkpoint_steps: int = 200
    """Steps between two checkpoints within an epoch; there is one at each epoch's end too. 0: only there."""
    keep_checkpoints: int = 2
    """Checkpoints that stay, the newest; the last one is what is registered."""
    max_restarts: int = 5
    """Times in a row, without a new checkpoint in between, that a training whose worker died is started again. What is
    announced (SIGTERM, a node that Ray drains) is not counted."""

    def __post_init__(self) -> None:
        if not 1 <= self.fewest_workers <= self.most_workers:
            raise UserError(f'resources.workers = {self.workers!r}: must be at least 1, or a range such as "2-8"')
        if self.reduce == "deterministic" and self.most_workers > self.virtual_ranks:
            raise UserError(
                f"resources.virtual_ranks = {self.virtual_ranks}: must be at least the number of workers "
                f'({self.most_workers}) with resources.reduce = "deterministic"'
            )
        for name in ("prefetch_batches", "virtual_ranks", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"resources.{name} = {getattr(self, name)}: must be at least 1")
        not_negative = ("gpus_per_worker", "cpus_per_worker", "memory_per_worker", "disk_cache", "checkpoint_steps")
        for name in (*not_negative, "loader_threads", "max_restarts", "resize_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"resources.{name} = {getattr(self, name)}: must not be negative")

    @property
    def unmeasured_threads(self) -> int:
        """`loader_threads`, or a few, for what reads too little to measure."""
        return self.loader_threads or 2

    def asked(self, num_workers: int = 1) -> dict[str, float]:
        """What so many workers ask Ray for, by Ray's names."""
        gpus, memory = self.gpus_per_worker, self.memory_per_worker * 1e9
        each = {"CPU": self.cpus_per_worker} | ({"GPU": gpus} if gpus else {}) | ({"memory": memory} if memory else {})
        return {name: amount * num_workers for name, amount in each.items()}

    @property
    def fewest_workers(self) -> int:
        """Below this a training waits; 0 if `workers` is no number and no range."""
        return self._range[0]

    @property
    def most_workers(self) -> int:
        """More are never started."""
        return self._range[1]

    @property
    def _range(self) -> tuple[int, int]:
        if isinstance(self.workers, int):
            return self.workers, self.workers
        found = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", self.workers)
        return (int(found[1]), int(found[2])) if found else (0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All that decides a training, except the split."""

    dataset: str
    """A packed set: its name on the site, an s3:// URI or a folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    stage1: StageConfig = STAGE1
    stage2: StageConfig = STAGE2
    resources: ResourceConfig = field(default_factory=ResourceConfig)

    def __post_init__(self) -> None:
        for name, stage in {"stage1": self.stage1, "stage2": self.stage2}.items():
            if stage.features == "always" and self.training.views != "corner-scale":
                raise UserError(
                    f'{name}.features = "always" needs training.views = "corner-scale" (now "{self.training.views}"): '
                    "of TSN's 260 views a clip nothing is stored"
                )
            if stage.features == "always" and self.model.temporal == "conv3d":
                raise UserError(
                    f'{name}.features = "always" needs a trunk of frames: of "conv3d" nothing is stored; choose "never"'
                )
            if stage.features == "always":
                self.require_named_features(stage)
        if self.training.decoder == "nvjpeg" and not self.resources.gpus_per_worker:
            raise UserError(
                'training.decoder = "nvjpeg" needs GPUs: set resources.gpus_per_worker, or training.decoder = "libjpeg"'
            )

    @property
    def trunk_precision(self) -> str:
        """What names of features and codebooks say: `training.precision`, but for a GPU's float32, of which there are
        some under that name that were computed in TF32."""
        precision = self.training.precision
        return "float32 without TF32" if precision == "float32" and self.resources.gpus_per_worker else precision

    def names_features(self, stage: StageConfig) -> bool:
        """Whether the stage may learn from features: by name they are what the trunk that training began with makes of
        libjpeg's pixels."""
        if self.training.decoder == "nvjpeg":
            return False
        trained_before = stage == self.stage2 and self.stage1.epochs > 0 and self.stage1.feature_kind == "early"
        return not (trained_before and stage.feature_kind == "last")

    def require_named_features(self, stage: StageConfig) -> None:
        """UserError for a stage that has none."""
        if self.training.decoder == "nvjpeg":
            raise UserError(
                'training.decoder = "nvjpeg": features are made of libjpeg\'s pixels, so stages learn from frames: set '
                'stage1.features and stage2.features to "auto" or "never", or training.decoder = "libjpeg"'
            )
        if not self.names_features(stage):
            raise UserError(
                "stage2: features are named by the weights that training began with, and stage 1 trains the trunk "
                '(stage1.trunk or stage1.fc), whose last maps are others then: set stage2.features = "never"'
            )

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted name, such as "stage1.lr"."""
        return _flatten(dataclasses.asdict(self), "")

    def decisive(self) -> dict[str, Any]:
        """The fields that decide what is computed, by dotted name."""
        decisive = {name: value for name, value in self.flat().items() if not name.startswith("resources.")}
        del decisive["features.budget_gigabytes"]
        del decisive["dataset"]  # the set's own fingerprint, among the facts of a name, says which
        return decisive

    def fingerprint(self, **facts: str | int) -> str:
        """Names what will be computed: the same recipe and facts (set, split) give the same 64 hex digits."""
        return fingerprint(self.decisive(), facts)

    def first_fingerprint(self, **facts: str | int) -> str | None:
        """What the first names held in its place, if they could."""
        return first_fingerprint(self.decisive(), facts)


def load_recipe(name: str, changes: list[str] | None = None, dataset: str | None = None) -> Recipe:
    """The recipe of a TOML file, or of ours by name, with changes like "stage1.lr=0.005" made to it.

    Raises ValueError naming the file and the key for whatever is wrong in it.
    """
    path, values = recipe_file(name), recipe_values(name, changes, dataset)
    model = values.get("model")
    if isinstance(model, dict) and is_local_file(model.get("weights")):
        model["weights"] = str(Path(model["weights"]).absolute())  # workers run in folders of their own
    if "dataset" not in values:
        raise UserError(f'{path.name} names no dataset: add dataset = "NAME" to it, or give --dataset NAME')
    try:
        return _with_precision(parse(Recipe, values))
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from None


def recipe_values(name: str, changes: list[str] | None = None, dataset: str | None = None) -> dict[str, Any]:
    """The tables of `load_recipe`'s recipe as they are written, unchecked."""
    values = read_toml(recipe_file(name))
    for change in changes or []:
        _apply(values, change)
    return values if dataset is None else values | {"dataset": dataset}


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. UserError for what is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None


def _with_precision(recipe: Recipe) -> Recipe:
    """With `precision = "auto"` decided, since names of features and trainings say it: without GPUs, by this
    machine's CPU."""
    if recipe.training.precision != "auto":
        return recipe
    precision = "bf16" if recipe.resources.gpus_per_worker else quick_precision("cpu")
    return change_recipe(recipe, {"training": {"precision": precision}})


def change_recipe(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    """The recipe with some fields of its tables changed."""
    return parse(Recipe, dict(changes), base=recipe)


def recipe_file(name: str) -> Path:
    """The file of a recipe: a path that ends in .toml, or the name of one of ours."""
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UserError(f"recipe {path} does not exist: give a TOML file or one of {', '.join(known_recipes())}")
        return path
    if name not in known_recipes():
        raise UserError(f"no recipe is named {name}: give a TOML file or one of {', '.join(known_recipes())}")
    return RECIPES / f"{name}.toml"


def is_local_file(weights: Any) -> bool:
    """Whether `model.weights` names a file rather than what is fetched, drawn or read from S3."""
    return isinstance(weights, str) and weights not in ("imagenet", "none") and "://" not in weights


def is_place(dataset: str) -> bool:
    """Whether a packed set is given by its folder or URI rather than by its name."""
    return "/" in dataset or dataset == "."


def known_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _apply(values: dict[str, Any], change: str) -> None:
    key, value = parse_change(change)
    *tables, last = key.split(".")
    for table in tables:
        if not isinstance(values.setdefault(table, {}), dict):
            raise UserError(f"--set {change}: {table} is a value, not a table of keys")
        values = values[table]
    values[last] = value


def parse_change(change: str) -> tuple[str, Any]:
    """The dotted key and the value of a change like "stage1.lr=0.005"; what is no TOML value is a string."""
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {change}: write it as table.key=value, such as stage1.lr=0.005")
    try:
        return key.strip(), tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text.strip()


def _flatten(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
