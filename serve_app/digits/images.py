"""The demo's images: scikit-learn's handwritten digits, enlarged, split by image, and seen through a fogged lens.

Everything is seeded: two machines make the same files. Called by `prepare` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.transforms import v2

SIDE = 32  # pixels; scikit-learn ships 8 x 8
NUM_TRAIN, NUM_REFERENCE, NUM_TRAFFIC, NUM_EVAL = 750, 400, 350, 297  # disjoint images, 1,797 in all
NUM_CLEAN_ROWS = 1500  # traffic repeats its images, every time transformed anew
NUM_DRIFTED_ROWS = 2400
SPLIT_SEED, CLEAN_SEED, DRIFT_SEED = 0, 1, 2

# A lens fogs over: blur, washed-out contrast, sensor noise; strength varies by image. Measured with the model
# of `prepare` on the eval images: accuracy 0.973 -> 0.411, and 0.983 again by normalisation statistics alone, which
# cost 20 points on clean images. Stronger fog (contrast 0.4-0.6, sigma 1-2): 0.17-0.22 on three training seeds.
BLUR_KERNEL, BLUR_SIGMA = 9, (1.0, 1.6)  # pixels
CONTRAST = (0.5, 0.7)  # 1 = unchanged
NOISE_SIGMA = 0.05  # of the full range


@dataclass(frozen=True)
class Split:
    """Images `[N, 32, 32, 3]` uint8 and their labels `[N]` int64."""

    inputs: np.ndarray
    labels: np.ndarray


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Torch's intra-operation threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_images() -> dict[str, Split]:
    """The parts `train`, `reference`, `traffic` and `eval`; no image is in two of them."""
    from sklearn.datasets import load_digits  # 1 s to import: only when the cache is made

    digits = load_digits()
    small_N1HW = torch.tensor(digits.images / 16 * 255, dtype=torch.float32)[:, None]
    large_N1HW = interpolate(small_N1HW, size=SIDE, mode="bicubic", align_corners=False).clamp(0, 255).round()
    images_NHWC = large_N1HW.to(torch.uint8).permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images_NHWC))
    ends = np.cumsum([NUM_TRAIN, NUM_REFERENCE, NUM_TRAFFIC, NUM_EVAL])
    assert ends[-1] == len(order)
    labels = digits.target.astype(np.int64)
    parts = np.split(order, ends[:-1])
    names = ("train", "reference", "traffic", "eval")
    return {name: Split(images_NHWC[rows], labels[rows]) for name, rows in zip(names, parts, strict=True)}


def jitter() -> v2.Transform:
    """What writers and cameras vary anyway: a small shift, turn and zoom. Augments training and clean traffic."""
    return v2.RandomAffine(degrees=6, translate=(0.04, 0.04), scale=(0.95, 1.05))


def fogged_lens() -> v2.Transform:
    """The drift."""
    return v2.Compose(
        [
            v2.GaussianBlur(BLUR_KERNEL, BLUR_SIGMA),
            v2.ColorJitter(contrast=CONTRAST),
            v2.ToDtype(torch.float32, scale=True),
            v2.GaussianNoise(sigma=NOISE_SIGMA),
            v2.ToDtype(torch.uint8, scale=True),
        ]
    )


def transformed(split: Split, transform: v2.Transform, rows: int, seed: int) -> Split:
    """`rows` random images of `split` with repeats, each transformed by a fresh draw.

    Args:
        split: source images.
        transform: takes and returns one `[3, 32, 32]` uint8 tensor.
        rows: how many; equal to the split's size: every image once, in order.
        seed: of the order and of the draws; torch's global generator is left as it was.
    """
    index = np.arange(rows) % len(split.labels)
    if rows != len(split.labels):
        index = np.random.default_rng(seed).permutation(index)
    images_NCHW = torch.from_numpy(split.inputs[index]).permute(0, 3, 1, 2)
    with (
        threads(1),
        torch.random.fork_rng(devices=[]),
    ):  # on images this small a second thread only costs: 1 ms -> 35 ms
        torch.manual_seed(seed)
        out_NCHW = torch.stack([transform(image) for image in images_NCHW])
    return Split(out_NCHW.permute(0, 2, 3, 1).contiguous().numpy(), split.labels[index])


def traffic(parts: dict[str, Split]) -> dict[str, Split]:
    """The four data sets of the demo: `clean`, `drifted`, `eval_clean`, `eval_drifted`."""
    drifted = v2.Compose([jitter(), fogged_lens()])
    num_eval = len(parts["eval"].labels)
    return {
        "clean": transformed(parts["traffic"], jitter(), NUM_CLEAN_ROWS, CLEAN_SEED),
        "drifted": transformed(parts["traffic"], drifted, NUM_DRIFTED_ROWS, DRIFT_SEED),
        "eval_clean": transformed(parts["eval"], jitter(), num_eval, CLEAN_SEED + 10),
        "eval_drifted": transformed(parts["eval"], drifted, num_eval, DRIFT_SEED + 10),
    }
