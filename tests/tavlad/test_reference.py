"""The model against the slow formulas of reference.py: logits and gradients, for every variant, in float64."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

import tavlad.model
from tavlad.attention import attention_weights, class_activation
from tavlad.backbone import TrunkMaps, TrunkNetwork
from tavlad.clip import Features, mirror
from tavlad.config import Modality, ModelConfig
from tavlad.model import TaVlad
from tavlad.temporal import gru_over_time
from tavlad.vlad import Vlad
from tests.tavlad import reference, tiny
from tests.tavlad.reference import Array, Head

CLIPS, FRAMES, SIZE, HEIGHT, WIDTH = 2, 3, 5, 2, 3
PLACES, CLUSTERS, GRU_WIDTH, CLASSES, ACTIONS = HEIGHT * WIDTH, 4, 3, 6, 3

REDUCED = 4
"""Size of descriptors behind the PCA."""

Attention = Literal["none", "cam", "frozen-cam"]
Temporal = Literal["sum", "gru", "change", "consensus"]
Descriptor = Literal["pre_relu", "post_relu"]
EVERY_VARIANT = list(itertools.product(("none", "cam", "frozen-cam"), ("sum", "gru"), ("pre_relu", "post_relu")))


class _GivenMaps(TrunkNetwork):
    """A trunk whose maps are parameters, whatever the images: so gradients reach each map alone. Asked for whole clips,
    it gives the next clips' maps, in turn."""

    def __init__(self) -> None:
        super().__init__(mean=(0.25, 0.5, 0.75), std=(0.125, 0.25, 0.5))  # exact in float32
        self.feature_size = SIZE
        self.pre = nn.Parameter(torch.zeros(CLIPS * FRAMES, SIZE, HEIGHT, WIDTH))
        self.post = nn.Parameter(torch.zeros(CLIPS * FRAMES, SIZE, HEIGHT, WIDTH))
        self.fc = nn.Linear(SIZE, CLASSES)
        self.images = torch.empty(0)
        self._next = 0

    @property
    def classifier(self) -> nn.Linear:
        return self.fc

    def maps(self, images_BCHW: Float[Tensor, "B 3 H W"]) -> TrunkMaps:
        self.images = images_BCHW
        rows = slice(self._next, self._next + len(images_BCHW))
        if len(images_BCHW) % FRAMES == 0:
            self._next = rows.stop % len(self.pre)
        return TrunkMaps(self.pre[rows], self.post[rows])

    def last_block_convs(self, downsample: bool = True) -> list[nn.Module]:
        return []


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TaVlad]:
    """Builds a small model without dropout over a trunk of given maps."""
    monkeypatch.setattr(tavlad.model, "build_trunk", lambda _: _GivenMaps())

    def build_model(attention: Attention, temporal: Temporal, descriptor: Descriptor, **options: Any) -> TaVlad:
        config = ModelConfig(
            attention=attention,
            temporal=temporal,
            descriptor=descriptor,
            num_clusters=CLUSTERS,
            gru_width=GRU_WIDTH,
            **options,
        )
        return TaVlad(config, ACTIONS).double().eval()

    return build_model


def _random_head(temporal: str, alpha: float, seed: int = 0, size: int = SIZE) -> Head:
    """Random numbers for all of it; centres of about unit length, as k-means on unit descriptors gives.

    `size` is that of the descriptors as VLAD gets them.
    """
    generator = np.random.default_rng(seed)

    def draw(*shape: int, scale: float = 1.0) -> Array:
        return scale * generator.standard_normal(shape)

    centres_KD = draw(CLUSTERS, size, scale=size**-0.5)
    assign_weight_KD, assign_bias_K = reference.assignment(centres_KD, alpha)
    width = CLUSTERS * (size if temporal == "sum" else GRU_WIDTH)
    return Head(
        pre_BTDN=draw(CLIPS, FRAMES, SIZE, PLACES),
        post_BTDN=draw(CLIPS, FRAMES, SIZE, PLACES),
        cam_BTDN=draw(CLIPS, FRAMES, SIZE, PLACES),
        fc_weight_CD=draw(CLASSES, SIZE),
        fc_bias_C=draw(CLASSES),
        assign_weight_KD=assign_weight_KD,
        assign_bias_K=assign_bias_K,
        centres_KD=centres_KD,
        classifier_weight=draw(ACTIONS, {"consensus": SIZE, "change": 2 * SIZE}.get(temporal, width)),
        classifier_bias_A=draw(ACTIONS),
        gru_weight_ih=draw(3 * GRU_WIDTH, size),
        gru_weight_hh=draw(3 * GRU_WIDTH, GRU_WIDTH),
        gru_bias_ih=draw(3 * GRU_WIDTH),
        gru_bias_hh=draw(3 * GRU_WIDTH),
    )


def _parameters(model: TaVlad) -> dict[str, nn.Parameter]:
    """The model's parameter that stands for each of the head's tensors."""
    trunk = model.trunk
    attending = trunk if model.attention_trunk is None else model.attention_trunk
    assert isinstance(trunk, _GivenMaps)
    assert isinstance(attending, _GivenMaps)
    parameters = {
        "pre_BTDN": trunk.pre,
        "post_BTDN": trunk.post,
        "fc_weight_CD": attending.fc.weight,
        "fc_bias_C": attending.fc.bias,
        "classifier_weight": model.classifier.weight,
        "classifier_bias_A": model.classifier.bias,
    }
    if model.vlad is not None:
        parameters |= {
            "assign_weight_KD": model.vlad.weight,
            "assign_bias_K": model.vlad.bias,
            "centres_KD": model.vlad.centres,
        }
    if model.attention_trunk is not None:
        parameters["cam_BTDN"] = attending.post
    if model.gru is not None:
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            parameters[f"gru_{name}"] = getattr(model.gru, f"{name}_l0")
    return parameters


@torch.no_grad()
def _fill(model: TaVlad, head: Head) -> None:
    for name, parameter in _parameters(model).items():
        parameter.copy_(torch.from_numpy(getattr(head, name)).reshape(parameter.shape))


def _frames() -> Tensor:
    return torch.randint(
        0, 256, (CLIPS, FRAMES, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("alpha", [5.0, 1000.0])
@pytest.mark.parametrize(("attention", "temporal", "descriptor"), EVERY_VARIANT)
def test_logits_are_those_of_the_formulas(
    build: Callable[..., TaVlad], attention: Attention, temporal: Temporal, descriptor: Descriptor, alpha: float
) -> None:
    for seed in (0, 1):
        head, model = _random_head(temporal, alpha, seed), build(attention, temporal, descriptor)
        _fill(model, head)
        expected = reference.logits(head, attention, temporal, descriptor)
        np.testing.assert_allclose(model(_frames()).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("attention", "temporal", "descriptor"), EVERY_VARIANT)
def test_gradients_are_the_slopes_of_the_formulas(
    build: Callable[..., TaVlad], attention: Attention, temporal: Temporal, descriptor: Descriptor
) -> None:
    """α = 5: at 1000 the memberships are saturated and their gradient vanishes."""
    head, model = _random_head(temporal, alpha=5.0), build(attention, temporal, descriptor)
    _fill(model, head)
    generator = np.random.default_rng(7)
    weights_BA = generator.standard_normal((CLIPS, ACTIONS))
    (model(_frames()) * torch.from_numpy(weights_BA)).sum().backward()

    def scalar(moved: Head) -> float:
        return float((reference.logits(moved, attention, temporal, descriptor) * weights_BA).sum())

    frozen = {"cam_BTDN", "fc_weight_CD", "fc_bias_C"} if attention == "frozen-cam" else set[str]()
    for name, parameter in _parameters(model).items():
        if name in frozen:
            continue
        gradient = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        gradient = gradient.reshape(getattr(head, name).shape)
        for _ in range(2):
            direction = generator.standard_normal(gradient.shape)
            slope = reference.slope(head, name, direction, scalar)
            np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-7, err_msg=name)


def test_the_gradient_check_sees_every_tensor(build: Callable[..., TaVlad]) -> None:
    """Else equal zeros would pass for agreement. Only the classifier's winner depends on fc's bias."""
    head, model = _random_head("gru", alpha=5.0), build("cam", "gru", "pre_relu")
    _fill(model, head)
    model(_frames())[:, 0].sum().backward()
    for name, parameter in _parameters(model).items():
        largest = 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
        assert (largest == 0) if name == "fc_bias_C" else (largest > 1e-4), name


def test_only_the_winning_classes_learn_through_the_attention(build: Callable[..., TaVlad]) -> None:
    head, model = _random_head("gru", alpha=5.0), build("cam", "gru", "pre_relu")
    _fill(model, head)
    model(_frames()).sum().backward()
    pooled_BTD = head.post_BTDN.mean(axis=3)
    winners = set((pooled_BTD @ head.fc_weight_CD.T + head.fc_bias_C).argmax(axis=2).ravel().tolist())
    gradient_CD = model.trunk.classifier.weight.grad
    assert gradient_CD is not None
    assert {c for c in range(CLASSES) if gradient_CD[c].abs().max() > 0} == winners
    assert 1 < len(winners) < CLASSES


def test_attention_of_the_second_trunk_leaves_the_first_ones_classifier_alone(build: Callable[..., TaVlad]) -> None:
    head, model = _random_head("gru", alpha=5.0), build("frozen-cam", "gru", "pre_relu")
    _fill(model, head)
    model(_frames()).sum().backward()
    assert isinstance(model.trunk, _GivenMaps)
    assert model.trunk.pre.grad is not None
    assert model.trunk.post.grad is None
    assert model.trunk.fc.weight.grad is None


@pytest.mark.parametrize("alpha", [5.0, 1000.0])
def test_initial_memberships_are_a_softmax_of_squared_distances(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Vlad(CLUSTERS, SIZE).double()
    centres_KD = torch.randn(CLUSTERS, SIZE, dtype=torch.float64, generator=generator)
    layer.initialise(centres_KD, alpha)
    weight_KD, bias_K = reference.assignment(centres_KD.numpy(), alpha)
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight_KD)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias_K)
    np.testing.assert_allclose(layer.centres.detach().numpy(), centres_KD.numpy())

    x_BTND = torch.randn(1, 1, 50, SIZE, dtype=torch.float64, generator=generator)
    squared_NK = np.array([[sum((x - c) ** 2) for c in centres_KD.numpy()] for x in x_BTND[0, 0].numpy()])
    exp_NK = np.exp(-alpha * (squared_NK - squared_NK.min(axis=1, keepdims=True)))
    expected_NK = exp_NK / exp_NK.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(layer.assign(x_BTND)[0, 0].detach().numpy(), expected_NK, rtol=1e-9, atol=1e-12)


def test_attention_is_the_sigmoid_of_the_winners_map(build: Callable[..., TaVlad]) -> None:
    for attention in ("cam", "frozen-cam", "none"):  # a model without attention shows its trunk's
        head, model = _random_head("sum", alpha=5.0), build(attention, "sum", "pre_relu")
        _fill(model, head)
        map_BTDN = head.cam_BTDN if attention == "frozen-cam" else head.post_BTDN
        expected = np.array([[reference.frame_attention(map_DN, head) for map_DN in clip] for clip in map_BTDN])
        shown = model.attention(_frames()).numpy()
        np.testing.assert_allclose(shown, expected.reshape(CLIPS, FRAMES, HEIGHT, WIDTH), rtol=1e-9)
        fc, map_BTND = model.trunk.classifier, torch.from_numpy(map_BTDN).transpose(2, 3)
        activation = class_activation(
            map_BTND, fc if model.attention_trunk is None else model.attention_trunk.classifier
        )
        np.testing.assert_allclose(1 / (1 + np.exp(-activation.detach().numpy())), expected, rtol=1e-9)


def test_a_raised_bias_changes_the_winner_and_nothing_else() -> None:
    """fc's bias takes part in choosing the class, not in its map."""
    classifier = nn.Linear(2, 2).double()
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        classifier.bias.zero_()
    features_BTND = torch.tensor([[[[2.0, 1.0], [4.0, -1.0]]]], dtype=torch.float64)
    for bias, expected in ((0.0, [2.0, 4.0]), (100.0, [1.0, -1.0])):
        with torch.no_grad():
            classifier.bias[1] = bias
        attention_BTN = attention_weights(class_activation(features_BTND, classifier), "sigmoid", 1.0)
        torch.testing.assert_close(attention_BTN[0, 0], torch.tensor(expected, dtype=torch.float64).sigmoid())


def test_last_states_are_those_of_the_written_out_recurrence() -> None:
    head = _random_head("gru", alpha=5.0)
    gru = nn.GRU(SIZE, GRU_WIDTH, batch_first=True).double()
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(gru, f"{name}_l0").copy_(torch.from_numpy(getattr(head, f"gru_{name}")))
    vlad_BTKD = np.random.default_rng(3).standard_normal((CLIPS, 7, CLUSTERS, SIZE))
    expected = np.array([reference.last_states(list(clip), head) for clip in vlad_BTKD])
    states = gru_over_time(torch.from_numpy(vlad_BTKD), gru)
    np.testing.assert_allclose(states.detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_trunk_sees_images_normalised_by_its_own_constants(build: Callable[..., TaVlad]) -> None:
    model, frames = build("none", "sum", "pre_relu"), _frames()
    model(frames)
    mean, std = np.array([0.25, 0.5, 0.75])[:, None, None], np.array([0.125, 0.25, 0.5])[:, None, None]
    expected = (frames.numpy().reshape(-1, 3, 8, 8) / 255 - mean) / std
    assert isinstance(model.trunk, _GivenMaps)
    np.testing.assert_allclose(model.trunk.images.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("attention", "temporal", "descriptor"), EVERY_VARIANT)
def test_float32_is_near_the_formulas_at_the_papers_sharpness(
    build: Callable[..., TaVlad], attention: Attention, temporal: Temporal, descriptor: Descriptor
) -> None:
    head, model = _random_head(temporal, alpha=1000.0), build(attention, temporal, descriptor)
    _fill(model, head)
    expected = reference.logits(head, attention, temporal, descriptor)
    np.testing.assert_allclose(model.float()(_frames()).detach().numpy(), expected, rtol=1e-2, atol=1e-3)


def test_mixed_precision_leaves_everything_but_trunk_and_gru_in_float32(build: Callable[..., TaVlad]) -> None:
    head, model = _random_head("sum", alpha=1000.0), build("cam", "sum", "pre_relu")
    _fill(model, head)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(_frames())
    torch.testing.assert_close(mixed, model(_frames()), rtol=0, atol=0)


# Departures from the paper, each against the same formulas

DEPARTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"attention_temperature": 2.5}, {"temperature": 2.5}),
    "standardised": (
        {"attention_scale": "standardised", "attention_temperature": 0.5},
        {"scale": "standardised", "temperature": 0.5},
    ),
    "minmax": ({"attention_scale": "minmax"}, {"scale": "minmax"}),
    "softmax": ({"attention_scale": "softmax", "attention_temperature": 1.5}, {"scale": "softmax", "temperature": 1.5}),
    "mean of states": ({"temporal_readout": "mean"}, {"readout": "mean"}),
    "signed root": ({"power": 0.5}, {"power": 0.5}),
    "pca": ({"descriptor_pca": REDUCED}, {}),
    "all": (
        {
            "descriptor_pca": REDUCED,
            "attention_scale": "standardised",
            "temporal_readout": "mean",
            "power": 0.7,
            "descriptor": "post_relu",
        },
        {"scale": "standardised", "readout": "mean", "power": 0.7},
    ),
}


@pytest.mark.parametrize("name", DEPARTURES)
def test_every_departure_from_the_paper_is_that_of_the_formulas(build: Callable[..., TaVlad], name: str) -> None:
    changes, written = DEPARTURES[name]
    changes = dict(changes)
    descriptor = changes.pop("descriptor", "pre_relu")
    model = build("cam", "gru", descriptor, **changes)
    head = _random_head("gru", alpha=5.0, size=REDUCED if model.pca is not None else SIZE)
    generator = np.random.default_rng(11)
    if model.pca is not None:
        components_PD = np.linalg.qr(generator.standard_normal((SIZE, REDUCED)))[0].T
        written = written | {"pca_mean_D": 0.1 * generator.standard_normal(SIZE), "pca_components_PD": components_PD}
        model.pca.mean.copy_(torch.from_numpy(written["pca_mean_D"]))
        model.pca.components.copy_(torch.from_numpy(components_PD))
    _fill(model, head)
    options = reference.Options(**written)
    weights_BA = generator.standard_normal((CLIPS, ACTIONS))

    def scores(moved: Head) -> Array:
        return reference.logits(moved, "cam", "gru", descriptor, options)

    logits_BA = model(_frames())
    np.testing.assert_allclose(logits_BA.detach().numpy(), scores(head), rtol=1e-6, atol=1e-8)
    plain = reference.logits(head, "cam", "gru", descriptor) if model.pca is None else None
    assert plain is None or np.abs(plain - scores(head)).max() > 1e-3, "it makes a difference"
    (logits_BA * torch.from_numpy(weights_BA)).sum().backward()
    for tensor, parameter in _parameters(model).items():
        gradient = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        gradient = gradient.reshape(getattr(head, tensor).shape)
        direction = generator.standard_normal(gradient.shape)
        slope = reference.slope(head, tensor, direction, lambda moved: float((scores(moved) * weights_BA).sum()))
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6, err_msg=tensor)


def test_consensus_is_the_average_of_the_frames_own_scores(build: Callable[..., TaVlad]) -> None:
    model, head = build("none", "consensus", "pre_relu"), _random_head("consensus", alpha=5.0)
    _fill(model, head)
    np.testing.assert_allclose(model(_frames()).detach().numpy(), reference.consensus_logits(head), rtol=1e-9)
    assert (model.vlad, model.gru, model.pca) == (None, None, None)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_change_is_the_deviation_and_the_mean_step_of_pooled_features(
    build: Callable[..., TaVlad], power: float
) -> None:
    """Scores, and the slopes by which the trunk's last block would learn."""
    model, head = build("none", "change", "pre_relu", power=power), _random_head("change", alpha=5.0)
    _fill(model, head)
    weights_BA = np.random.default_rng(2).standard_normal((CLIPS, ACTIONS))
    logits_BA = model(_frames())
    np.testing.assert_allclose(logits_BA.detach().numpy(), reference.change_logits(head, power), rtol=1e-6)
    (logits_BA * torch.from_numpy(weights_BA)).sum().backward()
    for tensor in ("post_BTDN", "classifier_weight"):
        gradient = _parameters(model)[tensor].grad
        assert gradient is not None
        direction = np.random.default_rng(3).standard_normal(getattr(head, tensor).shape)
        slope = reference.slope(
            head, tensor, direction, lambda moved: float((reference.change_logits(moved, power) * weights_BA).sum())
        )
        found = (gradient.numpy().reshape(direction.shape) * direction).sum()
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-6, err_msg=tensor)


def test_change_needs_two_frames(build: Callable[..., TaVlad]) -> None:
    model = build("none", "change", "pre_relu")
    with pytest.raises(ValueError, match=r'"change" compares frames: pack clips of at least two'):
        model.pool(Features(torch.zeros(1, 1, SIZE, HEIGHT, WIDTH, dtype=torch.float64), None))
    with pytest.raises(ValueError, match=r'model\.temporal = "change" has none: set "video"'):
        build("none", "change", "pre_relu", dropout_place="frame")


@pytest.mark.parametrize("place", ["video", "cluster", "frame"])
def test_dropout_sits_where_it_is_put(build: Callable[..., TaVlad], place: str) -> None:
    """Half of what is named is dropped, the rest doubled, in training alone."""
    model = build("none", "sum", "pre_relu", dropout_place=place)
    _fill(model, _random_head("sum", alpha=5.0))
    seen: list[tuple[Tensor, Tensor]] = []
    model.dropout.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model.train()
    torch.manual_seed(0)
    model(_frames())
    ((before, after),) = seen
    shapes = {
        "video": (CLIPS, CLUSTERS * SIZE),
        "cluster": (CLIPS, CLUSTERS, SIZE),
        "frame": (CLIPS, FRAMES, CLUSTERS, SIZE),
    }
    assert before.shape == shapes[place]
    kept = after != 0
    assert 0.2 < kept.double().mean() < 0.8
    torch.testing.assert_close(after[kept], 2 * before[kept])
    if place == "cluster":
        assert torch.equal(kept.all(dim=2), kept.any(dim=2)), "whole clusters"
    model.eval()
    torch.testing.assert_close(model(_frames()), model(_frames()))


@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_mirror_at_test_averages_the_logits_of_both_views(modality: Modality) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(tiny.CONFIG, mirror_at_test=True, modality=modality)
    model = tiny.build_model(config).eval()
    plain = tiny.build_model(dataclasses.replace(config, mirror_at_test=False)).eval()
    frames = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = (plain(frames) + plain(mirror(frames, modality))) / 2
        torch.testing.assert_close(model(frames), expected)
        assert not torch.allclose(plain(frames), expected)
        model.train()
        model.dropout.eval()
        torch.testing.assert_close(model(frames), plain(frames))


# Numbers on descriptors and maps of the paper's size


def test_assignment_on_unit_descriptors_is_nearest_centre_at_the_papers_sharpness() -> None:
    """W_k = 2αc_k, B_k = -α‖c_k‖²: with centres shorter than one, as k-means gives, a port without the square errs."""
    generator = torch.Generator().manual_seed(0)
    size, num_clusters = 512, 64
    groups_KD = nn.functional.normalize(torch.randn(num_clusters, size, dtype=torch.float64, generator=generator))
    noise = torch.randn(1, 1, 4000, size, dtype=torch.float64, generator=generator)
    members = torch.randint(num_clusters, (4000,), generator=generator)
    x_BTND = nn.functional.normalize(groups_KD[members] + 0.06 * noise, dim=-1)
    centres_KD = torch.stack([x_BTND[0, 0, members == k].mean(dim=0) for k in range(num_clusters)])
    lengths_K = centres_KD.norm(dim=1)
    assert lengths_K.max() < 0.9, "means of unit vectors are shorter than one"
    layer = Vlad(num_clusters, size).double()
    layer.initialise(centres_KD, alpha=1000.0)
    nearest = torch.cdist(x_BTND[0, 0], centres_KD).argmin(dim=1)
    assign_NK = layer.assign(x_BTND)[0, 0]
    assert torch.equal(assign_NK.argmax(dim=1), nearest)
    assert assign_NK.max(dim=1).values.median() > 0.999
    layer_float = Vlad(num_clusters, size)
    layer_float.initialise(centres_KD.float(), alpha=1000.0)
    assert torch.equal(layer_float.assign(x_BTND.float())[0, 0].argmax(dim=1), nearest)


def test_autocast_leaves_vlad_within_a_thousandth_of_float64_given_the_same_map() -> None:
    """Of a map as bf16 autocast makes it, at the paper's sharpness and sizes, random descriptors."""
    generator = torch.Generator().manual_seed(1)
    map_BTND = torch.randn(1, 5, 49, 512, generator=generator).bfloat16()
    x_BTND = nn.functional.normalize(map_BTND.float(), dim=-1, eps=1e-12)
    centres_KD = 0.6 * nn.functional.normalize(x_BTND[0, :, :13].flatten(0, 1)[:64], dim=-1)
    attention_BTN = torch.rand(1, 5, 49, generator=generator)
    layer, exact = Vlad(64, 512), Vlad(64, 512).double()
    layer.initialise(centres_KD, alpha=1000.0)
    exact.initialise(centres_KD.double(), alpha=1000.0)
    expected = exact(nn.functional.normalize(map_BTND.double(), dim=-1, eps=1e-12), attention_BTN.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x_BTND, attention_BTN)
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        naive = nn.functional.linear(x_BTND, layer.weight, layer.bias).float().softmax(dim=-1)
    assert (naive - layer.assign(x_BTND)).abs().max() > 0.1, "which autocast would not, were it not switched off"


@pytest.mark.parametrize("temporal", ["sum", "gru", "change", "consensus"])
def test_logits_do_not_depend_on_the_batch(temporal: Temporal) -> None:
    """Batch 1 against batch 32, float32, at the paper's sharpness; on a trunk with random weights."""
    attention: Attention = "none" if temporal in ("change", "consensus") else "cam"
    config = dataclasses.replace(tiny.CONFIG, temporal=temporal, attention=attention, num_clusters=8, alpha=1000.0)
    model = tiny.build_model(config).eval()
    frames = torch.randint(0, 256, (32, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model(frames)
        alone = torch.cat([model(clip[None]) for clip in frames])
    assert together.std(dim=0).max() > 1e-3, "clips differ"
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
