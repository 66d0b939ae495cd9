"""A discriminator on frozen DINOv2 features: Adv-GRPO's "dino patch", with defects of its reward mended.

Features are normalised for the reward and for training alike (the source does so for the reward alone), and the
patches that a score looks at follow from the picture, so that it can be computed again. Source: showlab/Adv-GRPO,
scripts/train_sd3_fast_dino_patch.py and adv_grpo/rewards.py.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model
from transformers.initialization import no_init_weights

from reward_bridge.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize, resize
from reward_bridge.weights import Table, find, load_strict, read, rename, torch_dtype

HIDDEN = 512
NAMES: Table = (  # of the published folders
    (r"(.+\.attention)\.attention\.query\.(.+)", r"\1.q_proj.\2"),
    (r"(.+\.attention)\.attention\.key\.(.+)", r"\1.k_proj.\2"),
    (r"(.+\.attention)\.attention\.value\.(.+)", r"\1.v_proj.\2"),
    (r"(.+\.attention)\.output\.dense\.(.+)", r"\1.o_proj.\2"),
    (r"(.+)", r"\1"),
)


class FrozenDino(nn.Module):
    """A DINOv2 that never learns and is always in eval mode, and a head that does."""

    def __init__(self, backbone: Dinov2Model, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def train(self, mode: bool = True) -> "FrozenDino":
        super().train(mode)
        self.backbone.eval()
        return self


class DinoDiscriminator:
    """(1 - w) h(class token) + w mean h(`patches` patch tokens), h a perceptron; trained with the hinge loss.

    `path`: a Dinov2Model folder, such as facebook/dinov2-base. `size`: pictures are resized to it squared, bicubic.
    `patch_weight` w, of the patches in the reward and in the loss. `normalize`: features are divided by their length,
    in both. `seed` draws the head's first weights, and with a picture's bytes the patches of its score. `dtype`: the
    backbone's; the head is float32.
    """

    def __init__(
        self,
        device: str,
        path: str,
        seed: int = 0,
        size: int = 518,
        patches: int = 64,
        patch_weight: float = 0.3,
        normalize: bool = True,
        dtype: str = "float32",
    ):
        if patches < 1 or not 0 <= patch_weight <= 1:
            raise ValueError(
                f"got patches {patches} and patch_weight {patch_weight}; expected at least 1, and between 0 and 1"
            )
        self.seed, self.size, self.patches, self.patch_weight = seed, size, patches, patch_weight
        self.normalize, self.dtype = normalize, torch_dtype(dtype)
        backbone = load_dinov2(path, "dino_discriminator.path")
        if size % backbone.config.patch_size:
            raise ValueError(
                f"got dino_discriminator.size {size}; expected a multiple of the patch size "
                f"{backbone.config.patch_size} of {path}"
            )
        self.model = (
            FrozenDino(backbone.to(self.dtype), make_head(backbone.config.hidden_size, seed))
            .to(device)
            .eval()
        )

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return resize(images, (self.size, self.size), "bicubic")

    def score(
        self, model: FrozenDino, images: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        features = self.features(model, images)
        count = features.shape[1] - 1
        index = torch.stack(
            [patches_of(picture, self.seed, count, self.patches) for picture in images]
        )
        return discriminator_reward(
            model.head, features, index.to(features.device), self.patch_weight
        )

    def loss(
        self, model: FrozenDino, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        features = self.features(model, torch.cat([real, generated]))
        index = torch.randint(features.shape[1] - 1, (len(features), self.patches)).to(
            features.device
        )
        return hinge_loss(model.head, features.chunk(2), index.chunk(2), self.patch_weight)

    def features(self, model: FrozenDino, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, size, size] -> float32 [n, 1 + patches, D] after the last norm, the class token first."""
        with torch.no_grad():
            x = model.backbone(
                normalize(images, IMAGENET_MEAN, IMAGENET_STD, self.dtype)
            ).last_hidden_state.float()
        return unit(x) if self.normalize else x


def make_head(width: int, seed: int) -> nn.Sequential:
    """Two layers to one number, with torch's first weights for linear layers, the same ones for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))


def load_dinov2(path: str, option: str) -> Dinov2Model:
    """A Dinov2Model folder as transformers saves it. Raises FileNotFoundError and ValueError, see weights.py."""
    folder = find(path, option, "config.json").parent
    file = find(str(folder), option, "model.safetensors", "pytorch_model.bin")
    with no_init_weights():  # all of them are about to be loaded
        model = Dinov2Model(Dinov2Config.from_pretrained(folder))
    return load_strict(model, rename(read(file), NAMES, file), file)


def unit(x: torch.Tensor) -> torch.Tensor:
    """[..., d] over its length, or nearly: 1e-6 is added to that."""
    return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


def patches_of(picture: torch.Tensor, seed: int, count: int, patches: int) -> torch.Tensor:
    """int64 [patches] below `count`, with replacement, by the seed and the bytes of a picture (uint8 [3, h, w])."""
    checksum = zlib.crc32(
        picture.contiguous().cpu().numpy(), seed % 2**32
    )  # all that torch's CPU generator takes
    return torch.randint(count, (patches,), generator=torch.Generator().manual_seed(checksum))


def logits(
    head: nn.Module, features: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, 1 + t, d], int [n, k] -> h of the class tokens [n], and of the patches at `index` [n, k]."""
    patches = features[:, 1:].gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
    return head(features[:, 0]).squeeze(-1), head(patches).squeeze(-1)


def discriminator_reward(
    head: nn.Module, features: torch.Tensor, index: torch.Tensor, patch_weight: float
) -> torch.Tensor:
    """[n]; see `logits`."""
    whole, patches = logits(head, features, index)
    return (1 - patch_weight) * whole + patch_weight * patches.mean(1)


def hinge_loss(
    head: nn.Module,
    features: Sequence[torch.Tensor],
    index: Sequence[torch.Tensor],
    patch_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """1/2 [mean relu(1 - h(real)) + mean relu(1 + h(generated))] of class tokens, and `patch_weight` of the patches'.

    `features` and `index`: of the real and of the generated pictures, see `logits`. The accuracy is the class tokens'.
    """
    real, generated = (logits(head, f, i) for f, i in zip(features, index, strict=True))
    whole, patches = (
        ((1 - r).relu().mean() + (1 + g).relu().mean()) / 2
        for r, g in zip(real, generated, strict=True)
    )
    accuracy = ((real[0] > 0).float().mean() + (generated[0] < 0).float().mean()) / 2
    metrics = {"accuracy": accuracy, "class_loss": whole.detach(), "patch_loss": patches.detach()}
    return whole + patch_weight * patches, metrics
