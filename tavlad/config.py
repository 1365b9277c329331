"""Every setting of the model and its training, one dataclass a concern, and the one parser that fills them."""

import dataclasses
import difflib
import types
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from tavlad.clip import FeatureKind, Modality
from tavlad.errors import UserError

Config = TypeVar("Config")

TRUNKS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "efficientnet_lite0",
    "densenet121",
    "squeezenet1_1",
    "googlenet",
    "vgg16",
    "r3d_18",
)
"""The trunks with a name of their own; "timm:NAME" is any fitting one of timm's."""

NO_ACTIVATION_MAPS = ("vgg16", "r3d_18")
"""Those whose classifier is not one linear layer on the averaged map of a frame: no top-down attention."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What the network is. Travels with the weights."""

    modality: Modality = "rgb"
    """What its frames show: must be that of the set (`tavlad pack --modality`)."""
    trunk: str = "resnet34"
    """The frame network, an ImageNet classifier with global average pooling and one linear layer: one of `TRUNKS`, or
    "timm:NAME". vgg16 has three linear layers: no attention. r3d_18 is for temporal = "conv3d"."""
    weights: str = "imagenet"
    """Its weights: "imagenet", "none" (random, from the seed), a path or an s3:// URI."""
    attention: Literal["none", "cam", "frozen-cam"] = "cam"
    """Top-down attention: none; from the trunk itself; or from a second, never fine-tuned copy of the trunk."""
    attention_scale: Literal["sigmoid", "standardised", "minmax", "softmax"] = "sigmoid"
    """From the class activation map M to weights in [0, 1]: sigmoid(M), as the paper; the sigmoid of M standardised
    over each frame's places; M scaled to 0..1 in each frame; or the softmax over places, its largest scaled to 1."""
    attention_temperature: float = 1.0
    """What M is divided by before the sigmoid or the softmax: above 1 is flatter. Must be 1 for "minmax"."""
    temporal: Literal["sum", "gru", "change", "consensus", "single-frame", "lstm-attention", "conv3d", "tdd"] = "gru"
    """How the frames become one: the sum of their VLADs (ActionVLAD), or K GRUs with shared weights over them. Without
    VLAD: how much each of the trunk's features changes over time (for small sets); the average of the frames' own
    logits (TSN); training on single frames, whose probabilities are averaged in testing (two-stream); an LSTM with soft
    attention over places; a trunk that convolves over time (I3D), the average of its moments' logits. "tdd" is no
    network: the trunk's map along trajectories, Fisher vectors of `num_clusters` Gaussians of `descriptor_pca` numbers,
    and an SVM."""
    temporal_readout: Literal["last", "mean"] = "last"
    """What is taken of the GRU's states: the last, as the paper, or their mean over time."""
    descriptor: Literal["pre_relu", "post_relu"] = "pre_relu"
    """Side of the last ReLU the descriptors come from (ActionVLAD: before); the attention uses the map after it."""
    num_clusters: int = 64
    """K, the visual words of the codebook."""
    descriptor_pca: int = 0
    """Size that descriptors are reduced to before VLAD, by a PCA learned with the codebook; 0: none, as the paper."""
    gru_width: int = 256
    """U, the state size of the GRU or LSTM; unused without one."""
    alpha: float = 1000.0
    """Sharpness of the soft assignment at the start (section 2.1)."""
    dropout: float = 0.5
    """Probability of dropping an element of what `dropout_place` names."""
    dropout_place: Literal["video", "cluster", "frame"] = "video"
    """The video descriptor before the classifier, as the paper; whole clusters of it; or each frame's VLAD."""
    power: float = 1.0
    """The video descriptor's elements become sign(v)|v|^power before its last normalisation; 0.5 is the signed square
    root, 1 the paper."""
    mirror_at_test: bool = False
    """Average the logits of a clip and of its mirror image when not training."""

    def __post_init__(self) -> None:
        self._check_trunk()
        _require(
            self.has_vlad or self.attention == "none",
            f'model.temporal = "{self.temporal}" has no VLAD to weigh: set model.attention = "none"',
        )
        _require(
            self.temporal != "change" or self.dropout_place != "frame",
            'model.dropout_place = "frame" drops VLADs, and model.temporal = "change" has none: set "video"',
        )
        _require(self.descriptor_pca >= 0, f"model.descriptor_pca = {self.descriptor_pca}: must not be negative")
        _require(0 < self.power <= 1, f"model.power = {self.power}: must be above 0 and at most 1")
        _require(
            self.attention_temperature > 0,
            f"model.attention_temperature = {self.attention_temperature}: must be above 0",
        )
        _require(
            self.attention_scale != "minmax" or self.attention_temperature == 1,
            'model.attention_temperature must be 1 with model.attention_scale = "minmax", which it would not change',
        )
        _require(self.num_clusters >= 1, f"model.num_clusters = {self.num_clusters}: must be at least 1")
        _require(self.gru_width >= 1, f"model.gru_width = {self.gru_width}: must be at least 1")
        _require(self.alpha > 0, f"model.alpha = {self.alpha}: must be above 0 (the paper uses 1000)")
        _require(0 <= self.dropout < 1, f"model.dropout = {self.dropout}: must be at least 0 and below 1")

    def _check_trunk(self) -> None:
        known = self.trunk in TRUNKS or self.trunk.startswith("timm:")
        names = ", ".join(map(repr, (*TRUNKS, "timm:NAME")))
        _require(known, f"model.trunk = {self.trunk!r}: must be one of {names}")
        _require(
            self.trunk not in NO_ACTIVATION_MAPS or self.attention == "none",
            f'model.trunk = "{self.trunk}" has no class activation map: set model.attention = "none"',
        )
        _require(
            (self.trunk == "r3d_18") == (self.temporal == "conv3d"),
            f'model.trunk = "{self.trunk}" does not fit model.temporal = "{self.temporal}": "conv3d" is for the trunk '
            '"r3d_18", and only it',
        )

    def require_network(self) -> None:
        """ValueError for "tdd", which no stage trains."""
        _require(
            self.temporal != "tdd",
            'model.temporal = "tdd" is no network to train: run it by tavlad reproduce NAME --table 2 --rows tdd-vgg16',
        )

    @property
    def has_vlad(self) -> bool:
        """Whether there is a VLAD layer, and so a codebook."""
        return self.temporal in ("sum", "gru")

    @property
    def unused(self) -> frozenset[str]:
        """Fields that change nothing here."""
        fields: set[str] = set()
        if not self.has_vlad and self.temporal != "tdd":
            fields |= {"descriptor", "num_clusters", "descriptor_pca", "alpha"}
        if self.temporal not in ("gru", "lstm-attention"):
            fields.add("gru_width")
        return frozenset(fields)

    @property
    def trunk_facts(self) -> dict[str, str | int]:
        """What names of features, codebooks and trainings say beside the trunk and its weights, so that what timm's
        trunks gave while their frozen form lost activations is not taken for what they give."""
        return {"trunk_form": 2} if self.trunk.startswith("timm:") else {}

    @property
    def can_pool(self) -> bool:
        """Whether a clip's frames become one without anything that learns or is drawn: see `TaVlad.pool`."""
        return self.temporal == "change" or (self.temporal == "sum" and self.dropout_place != "frame")

    @property
    def variant(self) -> str:
        """The configuration's name in the paper's Table 1 where it has one, such as "vlad-gru-256"; with "-flow" or
        "-difference" behind it for a model of motion."""
        return self._variant if self.modality == "rgb" else f"{self._variant}-{self.modality}"

    @property
    def _variant(self) -> str:
        if not self.has_vlad:
            return self.temporal
        temporal = "sum" if self.temporal == "sum" else f"gru-{self.gru_width}"
        if self.attention == "none":
            return "actionvlad" if self.temporal == "sum" else f"vlad-{temporal}"
        name = "ta-vlad" if self.attention == "cam" else "ta-vlad-frozen-cam"
        return name if temporal == "gru-256" else f"{name}-{temporal}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CodebookConfig:
    """How the K centres are found (METHOD, step 1)."""

    frames: int = 5000
    """Random training frames at most."""
    frames_per_video: int = 1
    """Random frames of one video at most; small sets need more than one."""

    def __post_init__(self) -> None:
        _require(self.frames >= 1, f"codebook.frames = {self.frames}: must be at least 1")
        _require(self.frames_per_video >= 1, f"codebook.frames_per_video = {self.frames_per_video}: must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """What both stages share."""

    batch_size: int = 32
    """Clips of a global batch, over all workers."""
    seed: int = 0
    """Fixes the codebook, the initial weights, the order, the augmentation and the dropout."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Of the trunk, and of the GRU in training (autocast); assignment and VLAD are computed in float32 always. auto:
    bf16 on a GPU and on CPUs with instructions for it; others would take two to four times as long as in float32."""
    scoring: Literal["float32", "training"] = "float32"
    """What the trained model is scored in: after the last epoch, by `evaluate` and by `predict`. In bf16 the sharp
    assignment names another action for some clips (docs/LOG.md); "training": in `precision`, which is quicker."""
    crop: int = 224
    """Side of the square the trunk sees, in pixels."""
    augment: bool = True
    """Corner crops, scale jitter and flips, one draw a clip; off: the centre crop of evaluation."""
    views: Literal["corner-scale", "tsn"] = "corner-scale"
    """What augmentation draws from: 4 scales x 5 places x flip, or TSN's 10 shapes x 13 places x flip."""
    num_views: int = 40
    """Of the forty views, how many a clip is shown in; fewer make a feature set smaller (docs/GUIDE, "Features")."""
    decoder: Literal["libjpeg", "nvjpeg"] = "libjpeg"
    """What decodes the JPEGs of training clips. nvjpeg: the GPU, each time a clip is read, for sets that do not fit
    in its memory and processors that cannot keep up; its pixels are up to 22 grey levels off, since it repeats colours
    of neighbouring pixels where libjpeg interpolates. Clips are tested, and features computed, by libjpeg always."""
    adam_eps: float = 1e-4
    """Adam's epsilon."""
    weight_decay: float = 4e-5
    """Adam's L2 penalty; the VLAD layer's tensors have none."""
    subset: float = 1.0
    """Share of the set's clips that is used, for training and for testing: below 1 only for rehearsals."""
    label_smoothing: float = 0.0
    """Share of a clip's label that is spread over all actions in the training loss."""
    compile: bool = False
    """torch.compile for the frozen trunk (on a GPU not a ResNet's, which runs in cuDNN's fused kernels), on a GPU also
    for the last block and the head: the first steps of each stage compile, and are slow. Needs a C++ compiler, and on a
    GPU Triton."""
    cuda_graphs: bool = False
    """With `compile`, on a GPU: what is compiled is recorded and launched as CUDA graphs, one for each size of a batch.
    For GPUs that wait for the launches of small batches; takes more memory."""
    recompute: bool = False
    """Compute the last block's activations again in backward instead of keeping them: less memory, more time."""
    evaluate_every: int = 1
    """Epochs between evaluations on the test part; the last epoch is always evaluated."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "crop", "evaluate_every"):
            _require(getattr(self, name) >= 1, f"training.{name} = {getattr(self, name)}: must be at least 1")
        _require(0 <= self.seed < 2**32, f"training.seed = {self.seed}: must be from 0 to {2**32 - 1}")
        _require(1 <= self.num_views <= 40, f"training.num_views = {self.num_views}: must be 1 to 40")
        _require(
            self.compile or not self.cuda_graphs, "training.cuda_graphs = true: needs training.compile = true as well"
        )
        _require(self.adam_eps > 0, f"training.adam_eps = {self.adam_eps}: must be above 0")
        _require(0 < self.subset <= 1, f"training.subset = {self.subset}: must be above 0 and at most 1")
        _require(
            0 <= self.label_smoothing < 1,
            f"training.label_smoothing = {self.label_smoothing}: must be at least 0 and below 1",
        )
        _require(self.weight_decay >= 0, f"training.weight_decay = {self.weight_decay}: must not be negative")

    @property
    def scoring_precision(self) -> Literal["auto", "bf16", "float32"]:
        """`scoring` as a precision."""
        return "float32" if self.scoring == "float32" else self.precision


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One of the two stages: what learns, for how long, how fast."""

    epochs: int
    """Passes over the training part; 0 leaves the stage out."""
    lr: float
    """Adam's learning rate in the first epoch."""
    steps: int = 0
    """About so many optimiser steps in the whole stage, for small sets: an epoch then makes as many passes over the
    training part as that takes, at least one. 0: one pass an epoch, as the paper."""
    decay_every: int = 5
    """Epochs between two decays of the learning rate."""
    decay_factor: float = 0.5
    """What a decay multiplies the learning rate by."""
    trunk: Literal["frozen", "last-block", "last-block-without-downsample"] = "frozen"
    """Which of the trunk's convolutions learn."""
    fc: bool = False
    """Whether the trunk's ImageNet classifier learns (through the attention)."""
    vlad: bool = False
    """Whether the assignment and the centres learn."""
    features: Literal["auto", "always", "never"] = "never"
    """Whether the stage learns from stored features instead of frames: the trunk's last maps while all of it is frozen,
    else the maps below its last block. auto: where that is quicker and within the budget. No last maps are stored for a
    stage 2 after a stage 1 that trained the trunk or its classifier."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 0, f"epochs = {self.epochs}: must not be negative")
        _require(self.steps >= 0, f"steps = {self.steps}: must not be negative")
        _require(self.lr > 0, f"lr = {self.lr}: must be above 0")
        _require(self.decay_every >= 1, f"decay_every = {self.decay_every}: must be at least 1")
        _require(0 < self.decay_factor <= 1, f"decay_factor = {self.decay_factor}: must be above 0 and at most 1")

    @property
    def feature_kind(self) -> FeatureKind:
        """What never changes in this stage and so can be stored. The trunk's classifier makes the attention."""
        return "early" if self.trunk != "frozen" or self.fc else "last"

    def passes(self, steps_a_pass: int) -> int:
        """Passes over the training part that one epoch makes, when one pass has so many steps."""
        return max(1, round(self.steps / (max(1, self.epochs) * steps_a_pass)))


STAGE1 = StageConfig(epochs=50, lr=1e-2, features="auto")
"""The paper's first stage: GRU and classifier."""
STAGE2 = StageConfig(epochs=30, lr=1e-4, trunk="last-block", fc=True, vlad=True)
"""The paper's second stage: also the last block's convolutions, the trunk's classifier and the VLAD layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """How a frozen trunk's features are stored."""

    dtype: Literal["float16", "float32"] = "float16"
    """Of the maps; float16 holds what a bf16 trunk computes without loss."""
    budget_gigabytes: float = 50.0
    """What a training may add to the store; more is refused before anything is computed."""

    def __post_init__(self) -> None:
        _require(
            self.budget_gigabytes >= 0, f"features.budget_gigabytes = {self.budget_gigabytes}: must not be negative"
        )


def parse(kind: type[Config], values: dict[str, Any], where: str = "", base: Config | None = None) -> Config:
    """Build the dataclass `kind` from plain values, nested tables included.

    Missing fields come from `base`, else from the defaults.
    Raises ValueError for an unknown key (naming the nearest known one), a wrong type or a missing key; `where` is
    the path of the table, used in the messages.
    """
    fields = {each.name: each for each in dataclasses.fields(cast(Any, kind))}
    hints = get_type_hints(kind)
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {_dotted(where, key)}: {_nearest(key, list(fields))}")
    parsed: dict[str, Any] = {}
    for name, each in fields.items():
        default = _default(each) if base is None else getattr(base, name)
        if name in values:
            parsed[name] = _parse_value(hints[name], values[name], _dotted(where, name), default)
        elif default is dataclasses.MISSING:
            raise UserError(f"missing key {_dotted(where, name)}: give it a value")
        else:
            parsed[name] = default
    try:
        return kind(**parsed)
    except UserError as error:
        # A dataclass used for two tables (the stages) names its field only.
        text = str(error)
        raise UserError(text if not where or text.startswith(where) else f"{where}.{text}") from None


def _default(each: "dataclasses.Field[Any]") -> Any:
    return each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _nearest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known keys are {', '.join(known)}"


def _parse_value(hint: Any, value: Any, where: str, default: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{where} = {value!r}: must be a table of keys")
        return parse(
            cast(type[Any], hint),
            cast(dict[str, Any], value),
            where,
            None if default is dataclasses.MISSING else default,
        )
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            raise UserError(f"{where} = {value!r}: must be one of {', '.join(map(repr, get_args(hint)))}")
        return value
    if origin in (Union, types.UnionType):
        plain = [each for each in get_args(hint) if each is not type(None)]
        fitting = [each for each in plain if isinstance(each, type) and isinstance(value, each)]
        return None if value is None else _parse_value((fitting or plain)[0], value, where, default)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} = {value!r}: must be a list")
        return tuple(_parse_value(get_args(hint)[0], each, where, None) for each in cast(list[Any], value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind = origin or hint
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{where} = {value!r}: must be of type {kind.__name__}")
    return value
