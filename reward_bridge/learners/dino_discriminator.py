"""A discriminator on frozen DINOv2 features: Adv-GRPO's "dino patch", with two defects corrected.

Features are normalised both for the reward and for training (the source only does so for the
reward). The patches used for a score are determined by the picture, so the score is reproducible.
Source: showlab/Adv-GRPO, scripts/train_sd3_fast_dino_patch.py and adv_grpo/rewards.py.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model
from transformers.initialization import no_init_weights

from reward_bridge.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize, resize
from reward_bridge.weights import Table, find, load_strict, read, rename, torch_dtype

HIDDEN = 512  # width of the head

# From the keys of the published folders to those of transformers 5.
NAMES: Table = (
    (r"(.+\.attention)\.attention\.query\.(.+)", r"\1.q_proj.\2"),
    (r"(.+\.attention)\.attention\.key\.(.+)", r"\1.k_proj.\2"),
    (r"(.+\.attention)\.attention\.value\.(.+)", r"\1.v_proj.\2"),
    (r"(.+\.attention)\.output\.dense\.(.+)", r"\1.o_proj.\2"),
    (r"(.+)", r"\1"),
)


class FrozenDino(nn.Module):
    """A frozen DINOv2 that stays in eval mode, and a trained head."""

    def __init__(self, backbone: Dinov2Model, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def train(self, mode: bool = True) -> "FrozenDino":
        super().train(mode)
        self.backbone.eval()
        return self


class DinoDiscriminator:
    """(1 - w) h(class token) + w mean h(patch tokens), where h is an MLP trained with a hinge loss.

    path: a Dinov2Model folder, such as facebook/dinov2-base.
    seed: of the head's initial weights and, with a picture's bytes, of the patches for its score.
    size: pictures are resized to size x size pixels, bicubic.
    patches: number of patch tokens, drawn with replacement.
    patch_weight: w, the weight of the patches in the reward and in the loss.
    normalize: divide features by their length, in the reward and in the loss.
    dtype: of the backbone; the head is float32.
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
        if patches < 1:
            raise ValueError(f"got dino_discriminator.patches {patches}; expected 1 or more")
        if not 0 <= patch_weight <= 1:
            raise ValueError(f"got dino_discriminator.patch_weight {patch_weight}; expected 0 to 1")
        self.seed = seed
        self.size = size
        self.patches = patches
        self.patch_weight = patch_weight
        self.normalize = normalize
        self.dtype = torch_dtype(dtype)

        backbone = load_dinov2(path, "dino_discriminator.path")
        if size % backbone.config.patch_size:
            raise ValueError(
                f"got dino_discriminator.size {size}; expected a multiple of the patch size "
                f"{backbone.config.patch_size} of {path}"
            )
        head = make_head(backbone.config.hidden_size, seed)
        self.model = FrozenDino(backbone.to(self.dtype), head).to(device).eval()

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, h, w] -> uint8 [n, 3, size, size]."""
        return resize(images, (self.size, self.size), "bicubic")

    def score(
        self, model: FrozenDino, images: torch.Tensor, prompts: Sequence[str]
    ) -> torch.Tensor:
        """The discriminator's output for uint8 pictures [n, 3, size, size]: float32 [n]."""
        features = self.features(model, images)
        count = features.shape[1] - 1
        index = torch.stack(
            [patches_of(picture, self.seed, count, self.patches) for picture in images]
        )
        index = index.to(features.device)
        return discriminator_reward(model.head, features, index, self.patch_weight)

    def loss(
        self, model: FrozenDino, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`hinge_loss` of m pairs, on patches drawn from torch's global generator."""
        features = self.features(model, torch.cat([real, generated]))
        count = features.shape[1] - 1
        index = torch.randint(count, (len(features), self.patches)).to(features.device)
        return hinge_loss(model.head, features.chunk(2), index.chunk(2), self.patch_weight)

    def features(self, model: FrozenDino, images: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, size, size] -> float32 [n, 1 + patches, D], the class token first."""
        pixels = normalize(images, IMAGENET_MEAN, IMAGENET_STD, self.dtype)
        with torch.no_grad():
            x = model.backbone(pixels).last_hidden_state.float()
        return unit(x) if self.normalize else x


def make_head(width: int, seed: int) -> nn.Sequential:
    """Two linear layers with one output, with torch's default initialisation from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 1))


def load_dinov2(path: str, option: str) -> Dinov2Model:
    """Load a Dinov2Model folder as transformers saves it.

    Raises FileNotFoundError if a file is missing, ValueError if the weights do not fit.
    """
    folder = find(path, option, "config.json").parent
    file = find(path, option, "model.safetensors", "pytorch_model.bin")
    with no_init_weights():  # all weights are loaded next
        model = Dinov2Model(Dinov2Config.from_pretrained(folder))
    return load_strict(model, rename(read(file), NAMES, file), file)


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / (|x| + 1e-6) along the last axis."""
    return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


def patches_of(picture: torch.Tensor, seed: int, count: int, patches: int) -> torch.Tensor:
    """Indices below `count`, int64 [patches], with replacement.

    They are determined by the seed and the bytes of the picture, uint8 [3, h, w].
    """
    # torch's CPU generator takes 32 bits.
    checksum = zlib.crc32(picture.contiguous().cpu().numpy(), seed % 2**32)
    return torch.randint(count, (patches,), generator=torch.Generator().manual_seed(checksum))


def logits(
    head: nn.Module, features: torch.Tensor, index: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """h of the class tokens [n] and of the patches at `index` [n, k].

    features: [n, 1 + t, d], the class token first. index: int [n, k], of patch tokens.
    """
    patches = features[:, 1:].gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
    return head(features[:, 0]).squeeze(-1), head(patches).squeeze(-1)


def discriminator_reward(
    head: nn.Module, features: torch.Tensor, index: torch.Tensor, patch_weight: float
) -> torch.Tensor:
    """(1 - w) h(class token) + w mean h(patches): [n]. For the arguments see `logits`."""
    whole, patches = logits(head, features, index)
    return (1 - patch_weight) * whole + patch_weight * patches.mean(1)


def hinge_loss(
    head: nn.Module,
    features: Sequence[torch.Tensor],
    index: Sequence[torch.Tensor],
    patch_weight: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The hinge loss [] of the class tokens plus `patch_weight` times that of the patches.

    1/2 [mean relu(1 - h(real)) + mean relu(1 + h(generated))]. `features` and `index` are pairs
    (real, generated); see `logits`. The accuracy is that of the class tokens.
    """
    real_whole, real_patches = logits(head, features[0], index[0])
    generated_whole, generated_patches = logits(head, features[1], index[1])
    class_loss = _hinge(real_whole, generated_whole)
    patch_loss = _hinge(real_patches, generated_patches)

    real_right = (real_whole > 0).float().mean()
    generated_right = (generated_whole < 0).float().mean()
    metrics = {
        "accuracy": (real_right + generated_right) / 2,
        "class_loss": class_loss.detach(),
        "patch_loss": patch_loss.detach(),
    }
    return class_loss + patch_weight * patch_loss, metrics


def _hinge(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    return ((1 - real).relu().mean() + (1 + generated).relu().mean()) / 2
