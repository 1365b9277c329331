"""The K visual words: k-means over descriptors of random training frames (METHOD, step 1), after a PCA if asked for."""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch.nn.functional import normalize

from tavlad.clip import ClipBatch
from tavlad.config import CodebookConfig, ModelConfig
from tavlad.errors import UserError
from tavlad.model import TaVlad
from tavlad.parallel import autocast
from tavlad.vlad import DescriptorPca, Pca, VisualWords


@torch.no_grad()
def sample_maps(
    model: TaVlad,
    batches: Iterable[ClipBatch],
    config: CodebookConfig,
    seed: int,
    precision: str,
    on_batch: Callable[[int], None] | None = None,
) -> Float32[np.ndarray, "F D h w"]:
    """The trunk's maps of random frames, read from clips in random order until there are enough.

    At most `config.frames` frames, `config.frames_per_video` of each clip, chosen as a function of (seed, key).
    `on_batch` is told how many clips are read.
    """
    model.eval()
    device = next(model.parameters()).device
    samples: list[np.ndarray] = []
    num_frames = num_clips = 0
    for batch in batches:
        frames = [
            clip_TCHW[random_frames(seed, key, len(clip_TCHW), config.frames_per_video)]
            for clip_TCHW, key in zip(batch.frames_BTCHW, batch.keys, strict=True)
        ]
        images = torch.cat(frames)[: config.frames - num_frames]
        with autocast(device, precision):
            features = model.features(images[None].to(device), with_activation=False)
        samples.append(features.maps_BTDHW[0].float().cpu().numpy())
        num_frames += len(images)
        num_clips += len(batch.keys)
        if on_batch is not None:
            on_batch(num_clips)
        if num_frames >= config.frames:
            break
    if not samples:
        raise UserError("there are no training clips to make a codebook from: the train part of this split is empty")
    return np.concatenate(samples)


def descriptors_of(maps: Float[np.ndarray, "F D h w"]) -> Float32[np.ndarray, "M D"]:
    """Unit-length descriptors of all places of maps."""
    places = torch.from_numpy(maps).float().flatten(2).transpose(1, 2).flatten(0, 1)
    return normalize(places, dim=-1, eps=1e-12).numpy()


def random_frames(seed: int, key: str, num_frames: int, count: int) -> list[int]:
    """`count` distinct frames (all of them if fewer) of the clip `key`, ascending; the same for the same seed."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = np.random.default_rng(int.from_bytes(digest, "big"))
    return sorted(generator.choice(num_frames, size=min(count, num_frames), replace=False).tolist())


def learn_words(descriptors: Float32[np.ndarray, "M D"], config: ModelConfig, seed: int) -> VisualWords:
    """The visual words of a configuration: a PCA if it asks for one, and the centres of what comes out of it."""
    if not config.descriptor_pca:
        return VisualWords(centres_KD=find_centres(descriptors, config.num_clusters, seed))
    pca = find_pca(descriptors, config.descriptor_pca, seed)
    layer = DescriptorPca(descriptors.shape[1], config.descriptor_pca)
    layer.mean.copy_(pca.mean_D)
    layer.components.copy_(pca.components_PD)
    reduced = layer(torch.from_numpy(descriptors)[None, None])[0, 0].numpy()
    return VisualWords(centres_KD=find_centres(reduced, config.num_clusters, seed), pca=pca)


def require_descriptors(
    model: ModelConfig, config: CodebookConfig, num_clips: int, num_frames: int, num_places: int
) -> None:
    """ValueError if a sample of so many clips, of so many frames and places each, cannot give the codebook."""
    sampled = min(config.frames, num_clips * min(config.frames_per_video, num_frames)) * num_places
    for name, wanted in (("num_clusters", model.num_clusters), ("descriptor_pca", model.descriptor_pca)):
        if wanted > sampled:
            raise UserError(
                f"model.{name} = {wanted} is more than the {sampled} descriptors that {num_clips} training clips give: "
                "lower it, or raise codebook.frames and codebook.frames_per_video"
            )


def find_pca(descriptors: Float32[np.ndarray, "M D"], size: int, seed: int) -> Pca:
    """The `size` directions of largest variance, not whitened."""
    if len(descriptors) < size:
        raise UserError(
            f"{len(descriptors)} descriptors cannot give {size} directions: lower model.descriptor_pca, or raise "
            "codebook.frames and codebook.frames_per_video"
        )
    from sklearn.decomposition import PCA  # here, as its import takes seconds that a training has no use for

    fitted = PCA(n_components=size, random_state=seed).fit(descriptors)
    return Pca(
        mean_D=torch.from_numpy(np.asarray(fitted.mean_, dtype=np.float32)),
        components_PD=torch.from_numpy(np.asarray(fitted.components_, dtype=np.float32)),
    )


def find_centres(descriptors: Float32[np.ndarray, "M D"], num_clusters: int, seed: int) -> Float[torch.Tensor, "K D"]:
    """The centres of k-means with scikit-learn's defaults; used as they are, not normalised again."""
    if len(descriptors) < num_clusters:
        raise UserError(
            f"{len(descriptors)} descriptors cannot make {num_clusters} clusters: lower model.num_clusters, or raise "
            "codebook.frames and codebook.frames_per_video"
        )
    from sklearn.cluster import KMeans

    kmeans = KMeans(n_clusters=num_clusters, random_state=seed).fit(descriptors)
    return torch.from_numpy(np.asarray(kmeans.cluster_centers_, dtype=np.float32))
