"""From a decoded image to what the model sees: per image on the CPU (uint8), then per batch on the device (float32).

The steps are timm's and torchvision's own, in timm's order; a recipe chooses among them with plain data.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode, str_to_pil_interp
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image

from tnt_lightning.data.augment import sooner
from tnt_lightning.data.images import decoded, scaled, upper_rows
from tnt_lightning.errors import UserError

Transform = Callable[[Image.Image], Tensor]


def train_transform(
    size: tuple[int, int],
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    interpolation: str = "bicubic",
    crop_scale: Sequence[float] | None = None,
    hflip: float = 0.0,
    rand_augment: str | None = None,
    color_jitter: float = 0.0,
    fast_resize: bool = False,
    dct_scaling: bool = False,
) -> Transform:
    """PIL image -> uint8 (C, height, width), at random; by default timm's pixels to the bit.

    crop_scale: share of the area that a random resized crop keeps (from, to); None resizes the whole image
    hflip: probability of a flip
    fast_resize: resize crops by torchvision, in about half of the time; about 1 value in 1,000 differs, by a level or a few of 256
    dct_scaling: decode a JPEG at a half, quarter or eighth where the crop is still larger than asked for; other pixels, a little softer
    rand_augment: timm's policy string; color_jitter: strength, used where there is no rand_augment (as timm and DeiT do)
    """
    steps: list[Callable] = []
    if fast_resize and interpolation not in ("bilinear", "bicubic"):
        raise UserError(f"recipe.augmentation.fast_resize=true: not by recipe.interpolation={interpolation}; bilinear or bicubic")
    if crop_scale is not None:
        crop = RandomResizedCrop(size, scale=tuple(crop_scale), interpolation=interpolation)
        crop.fast_resize, crop.dct_scaling = fast_resize, dct_scaling
        steps.append(crop)
    else:
        steps += [decoded, transforms.Resize(size, interpolation=str_to_interp_mode(interpolation))]
    if hflip:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if rand_augment:
        grey = tuple(min(255, round(255 * x)) for x in mean)
        hparams = dict(translate_const=int(min(size) * 0.45), img_mean=grey, interpolation=str_to_pil_interp(interpolation))
        try:
            policy = rand_augment_transform(rand_augment, hparams)
        except (AssertionError, KeyError, ValueError):
            raise UserError(
                f"recipe.augmentation.rand_augment={rand_augment}: no policy of timm's; the paper's is rand-m9-mstd0.5-inc1"
            ) from None
        steps.append(sooner(policy))
    elif color_jitter:
        steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
    return transforms.Compose([*steps, transforms.PILToTensor()])


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's, of an image of which no more is decoded than the crop needs."""

    fast_resize = dct_scaling = False

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.resized(self.cut(image))

    def cut(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        box = (left, top, left + width, top + height)
        if self.dct_scaling:
            image, box = scaled(image, box, self.size)
        return upper_rows(image, box[3]).crop(box)

    def resized(self, image: Image.Image) -> Image.Image:
        if not self.fast_resize:
            return resize(image, list(self.size), self.interpolation)
        return to_pil_image(resize(pil_to_tensor(image), list(self.size), self.interpolation, antialias=True))


def eval_transform(size: tuple[int, int], *, crop_pct: float = 0.9, interpolation: str = "bicubic") -> Transform:
    """PIL image -> uint8 (C, height, width): the middle crop_pct of the image."""
    return transforms.Compose([decoded, transforms_imagenet_eval(size, crop_pct=crop_pct, interpolation=interpolation, normalize=False)])


class BatchTransform:
    """On the device: uint8 images (B, C, H, W) and labels (B,) -> normalised float32 images and labels or soft targets.

    In training also, in this order:
    degrees, shift, zoom: a random affine map of each image, by at most so many degrees, share of the side, share of the scale
    erase: probability that a random rectangle of an image becomes noise
    mixup, cutmix: strength (alpha) of mixing the batch with itself; targets are then (B, num_classes)
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        degrees: float = 0.0,
        shift: float = 0.0,
        zoom: float = 0.0,
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ):
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) * 255 for x in (mean, std))
        self.degrees, self.shift, self.zoom, self.erase = degrees, shift, zoom, erase
        # Labels are smoothed in the loss, mixed or not, in one place.
        self.mix = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=num_classes) if mixup or cutmix else None

    def __call__(self, images: Tensor, labels: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)  # once: afterwards they are there
        images = (images.to(torch.float32, memory_format=torch.contiguous_format) - self.mean) / self.std
        if not training:
            return images, labels
        if self.degrees or self.shift or self.zoom:
            images = random_affine(images, degrees=self.degrees, shift=self.shift, zoom=self.zoom)
        if self.erase:
            images = RandomErasing(self.erase, mode="pixel", device=images.device)(images)
        if self.mix is not None:
            images, labels = self._mixed(images, labels)
        return images, labels

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """timm mixes pairs: of an odd number, where a broken image was left out, the last stays as it is."""
        assert self.mix is not None
        pairs = len(images) // 2 * 2
        alone = F.one_hot(labels[pairs:], self.mix.num_classes).float()
        if not pairs:
            return images, alone
        mixed, targets = self.mix(images[:pairs], labels[:pairs])
        return (mixed, targets) if pairs == len(images) else (torch.cat([mixed, images[pairs:]]), torch.cat([targets, alone]))


def random_affine(images: Tensor, *, degrees: float, shift: float, zoom: float) -> Tensor:
    """Each of (B, C, H, W) turned, moved and scaled at random, bilinear, zeros around; square pixels are kept.

    torchvision's RandomAffine moves by whole pixels, which for a digit of eight pixels is a lot or nothing.
    """
    b, _, height, width = images.shape
    draw = torch.rand(4, b, device=images.device) * 2 - 1
    angle, scale = draw[0] * math.radians(degrees), 1 + draw[1] * zoom
    cos, sin = angle.cos() / scale, angle.sin() / scale
    aspect = width / height
    theta = torch.stack(  # from output to input places, both from -1 to 1 over the image
        [torch.stack([cos, -sin / aspect, 2 * shift * draw[2]], -1), torch.stack([sin * aspect, cos, 2 * shift * draw[3]], -1)], 1
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
