"""Augmentation: pure functions of (batch, draws); batches: pure functions of (epoch, index), in parts for ranks."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from convlens.data import augment
from convlens.data.augment import BatchRandom
from convlens.data.dataset import Split
from convlens.data.loader import BatchLoader
from convlens.data.normalize import Normalize
from convlens.distributed.process_group import World

quick = settings(max_examples=50, deadline=None, database=None, derandomize=True)
CPU = torch.device("cpu")


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def draws(x: Tensor, seed: int = 0) -> BatchRandom:
    return BatchRandom.seeded(seed, len(x))


def batch(n: int = 8, c: int = 3, h: int = 12, w: int = 10) -> Tensor:
    return torch.randn(n, c, h, w, generator=generator(99))


IMAGES: dict[str, Callable[[Tensor, BatchRandom], Tensor]] = {
    "shift": lambda x, d: augment.translate(x, d, 3),
    "mirror": lambda x, d: augment.hflip(x, d.uniform() < 0.5),
    "affine": lambda x, d: augment.affine(x, d, 20, 0.2),
    "centre_crop_resize": lambda x, d: augment.center_crop_resize(x, d, 0.5, 0.7),
    "cutout": lambda x, d: augment.cutout(x, d, 5),
    "color_jitter": lambda x, d: augment.color_jitter(x, d, 0.4),
}
MIXERS = {"mixup": augment.mixup, "cutmix": augment.cutmix}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("channels", [1, 3])
def test_same_seed_same_bits_and_the_form_is_kept(name: str, channels: int) -> None:
    x = batch(c=channels)
    before = x.clone()
    torch.manual_seed(1)
    first = IMAGES[name](x, draws(x, 5))
    torch.manual_seed(2)  # the global generator has no say
    state = torch.get_rng_state()
    second = IMAGES[name](x, draws(x, 5))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.shape, first.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, before)
    assert torch.isfinite(first).all()


@pytest.mark.parametrize("name", IMAGES)
def test_another_seed_gives_other_images(name: str) -> None:
    x = batch(32)
    assert not torch.equal(IMAGES[name](x, draws(x, 1)), IMAGES[name](x, draws(x, 2)))


@pytest.mark.parametrize("name", IMAGES | MIXERS)
@pytest.mark.parametrize("part", [slice(0, 4), slice(4, 10), slice(10, 13)])
def test_a_part_of_a_batch_is_changed_as_in_the_whole(name: str, part: slice) -> None:
    x, labels = batch(13), torch.arange(13) % 4
    here = BatchRandom(generator(7), 13, part)
    if name in IMAGES:
        assert torch.allclose(IMAGES[name](x[part], here), IMAGES[name](x, draws(x, 7))[part], atol=1e-6)
        return
    images, mixed = MIXERS[name](x[part], labels[part], here, 1.0, 4)
    whole, labels = MIXERS[name](x, labels, draws(x, 7), 1.0, 4)
    assert torch.equal(images, whole[part])
    assert torch.equal(mixed, labels[part])


@pytest.mark.parametrize("name", IMAGES)
def test_the_images_of_a_batch_are_changed_each_on_its_own(name: str) -> None:
    x = batch(1).expand(16, -1, -1, -1).contiguous()
    changed = IMAGES[name](x, draws(x, 3))
    assert len({image.numpy().tobytes() for image in changed}) > 1


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 1, 5), (2, 1, 7, 2)])
def test_tiny_images_are_no_problem(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator())
    changed = IMAGES[name](x, draws(x))
    assert changed.shape == shape
    assert torch.isfinite(changed).all()


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("soft", [False, True])
def test_mixing_is_a_function_of_the_seed_and_keeps_its_input(name: str, soft: bool) -> None:
    x, labels = batch(), torch.arange(8) % 4
    y = augment.soft_labels(labels, 4) * 0.9 + 0.025 if soft else labels
    before = x.clone(), y.clone()
    first = MIXERS[name](x, y, draws(x, 5), 1.0, 4)
    torch.manual_seed(3)
    second = MIXERS[name](x, y, draws(x, 5), 1.0, 4)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert (first[0].shape, first[0].dtype) == (x.shape, x.dtype)
    assert (first[1].shape, first[1].dtype) == ((8, 4), torch.float32)


# identity at zero strength


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        (lambda x, d: augment.translate(x, d, 0), True),
        (lambda x, d: augment.cutout(x, d, 0), True),
        (lambda x, d: augment.center_crop_resize(x, d, 0.0, 0.5), True),
        (lambda x, d: augment.center_crop_resize(x, d, 1.0, 1.0), False),
        (lambda x, d: augment.affine(x, d, 0, 0), False),
        (lambda x, d: augment.color_jitter(x, d, 0), False),
    ],
    ids=["shift", "cutout", "crop-never", "crop-all", "affine", "jitter"],
)
def test_zero_strength_is_the_identity(change: Callable[[Tensor, BatchRandom], Tensor], exact: bool) -> None:
    x = batch()
    changed = change(x, draws(x))
    assert torch.equal(changed, x) if exact else torch.allclose(changed, x, atol=1e-4)


# each for itself


@quick
@given(st.integers(0, 9), st.integers(0, 2**32), st.integers(2, 9), st.integers(2, 9))
def test_shift_moves_by_at_most_n_pixels_with_a_mirrored_border(pixels: int, seed: int, h: int, w: int) -> None:
    x = torch.arange(2 * h * w, dtype=torch.float32).view(2, 1, h, w)
    moved = augment.translate(x, draws(x, seed), pixels)

    def mirror(i: int, size: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    for before, after in zip(x[:, 0], moved[:, 0], strict=True):
        found = [
            (dy, dx)
            for dy in range(-min(pixels, h - 1), min(pixels, h - 1) + 1)
            for dx in range(-min(pixels, w - 1), min(pixels, w - 1) + 1)
            if after[0, 0] == before[mirror(dy, h), mirror(dx, w)]
            and torch.equal(
                after,
                before[[mirror(r + dy, h) for r in range(h)]][:, [mirror(c + dx, w) for c in range(w)]],
            )
        ]
        assert found


def test_shift_reaches_every_direction_and_moves_channels_together() -> None:
    x = torch.zeros(400, 3, 9, 9)
    x[:, :, 4, 4] = torch.tensor([1.0, 2.0, 3.0])
    moved = augment.translate(x, draws(x), 2)
    places = {tuple(image[0].nonzero()[0].tolist()) for image in moved}
    assert places == {(r, c) for r in range(2, 7) for c in range(2, 7)}
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])
    assert torch.equal(moved[:, 2], 3 * moved[:, 0])


def test_mirror_turns_left_and_right_of_the_chosen_alone() -> None:
    x = batch(4, 1, 3, 4)
    mirrored = augment.hflip(x, torch.tensor([True, False, False, True]))
    for row, turned in enumerate((True, False, False, True)):
        assert torch.equal(mirrored[row], x[row].flip(2) if turned else x[row])


def test_each_image_is_mirrored_in_every_second_epoch() -> None:
    """Alternating flip: over two epochs each image comes once as it is and once mirrored; half begin mirrored."""
    n = 200
    images = torch.zeros(n, 1, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = 255  # a mark at the left
    images[:, 0, 1, 1] = torch.arange(n, dtype=torch.uint8)
    split = Split(images=images, labels=torch.arange(n), ids=tuple(map(str, range(n))))
    loader = BatchLoader(split, 50, Normalize((0.0,), (1.0,)), seed=3, augment=plain, hflip=True)
    seen = []
    for epoch in range(4):
        mirrored = torch.zeros(n, dtype=torch.bool)
        for index in range(len(loader)):
            x, y = loader(epoch, index)
            assert bool(((x[:, 0, 0, 0] > 0) ^ (x[:, 0, 0, 2] > 0)).all())
            mirrored[y] = x[:, 0, 0, 2] > 0
        seen.append(mirrored)
    assert torch.equal(seen[0], ~seen[1]) and torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert 70 < int(seen[0].sum()) < 130


def test_affine_turns_by_at_most_its_degrees() -> None:
    """A bright spot keeps its distance from the centre, on an image that is not square."""
    h, w = 41, 61
    rows, columns = torch.meshgrid(torch.arange(h) - 20.0, torch.arange(w) - 30.0, indexing="ij")
    x = torch.exp(-((rows - 0) ** 2 + (columns - 14) ** 2) / 8).expand(64, 1, h, w).contiguous()
    turned = augment.affine(x, draws(x), 30, 0)[:, 0]
    mass = turned.sum(dim=(1, 2))
    y, z = (turned * rows).sum(dim=(1, 2)) / mass, (turned * columns).sum(dim=(1, 2)) / mass
    assert torch.allclose((y**2 + z**2).sqrt(), torch.tensor(14.0), atol=0.3)
    angles = torch.rad2deg(torch.atan2(y, z))
    assert angles.abs().max() <= 30.5
    assert angles.min() < -20
    assert angles.max() > 20


def test_affine_zooms_by_at_most_its_scale() -> None:
    h, w = 41, 61
    columns = (torch.arange(w) - 30.0).expand(h, w)
    x = torch.exp(-((columns - 14) ** 2) / 8).expand(64, 1, h, w).contiguous()
    line = augment.affine(x, draws(x), 0, 0.2)[:, 0, 20]
    place = (line * columns[0]).sum(dim=1) / line.sum(dim=1) / 14
    assert place.min() > 0.79
    assert place.max() < 1.21
    assert place.min() < 0.85
    assert place.max() > 1.15


def test_affine_and_crop_keep_a_flat_image_flat() -> None:
    x = torch.full((4, 3, 8, 8), 1.5)
    assert torch.allclose(augment.affine(x, draws(x), 45, 0.5), x, atol=1e-5)
    assert torch.allclose(augment.center_crop_resize(x, draws(x), 1.0, 0.5), x, atol=1e-5)


def test_centre_crop_resize_shows_the_centre() -> None:
    x = torch.zeros(20, 1, 8, 8)
    x[:, :, 2:6, 2:6] = 1
    changed = augment.center_crop_resize(x, draws(x), 1.0, 0.4)
    assert torch.allclose(changed, torch.ones_like(x))
    some = augment.center_crop_resize(x, draws(x), 0.5, 0.4)
    cropped = some.flatten(1).mean(dim=1) > 0.99
    assert 0 < int(cropped.sum()) < 20
    assert torch.allclose(some[~cropped], x[~cropped], atol=1e-5)


@quick
@given(st.integers(1, 12), st.integers(0, 2**32), st.integers(1, 14), st.integers(1, 14))
def test_cutout_blanks_one_square(size: int, seed: int, h: int, w: int) -> None:
    x = torch.ones(4, 2, h, w)
    cut = augment.cutout(x, draws(x, seed), size)
    assert torch.equal(cut[:, 0], cut[:, 1])
    for image in cut[:, 0]:
        blank = image == 0
        rows, columns = blank.any(dim=1).nonzero().flatten(), blank.any(dim=0).nonzero().flatten()
        assert (image[~blank] == 1).all()
        if size >= 2:
            assert len(rows)
        if len(rows) == 0 or len(columns) == 0:
            continue
        assert blank[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # a full rectangle
        for found, length in ((rows, h), (columns, w)):
            touches = found[0] == 0 or found[-1] == length - 1
            assert len(found) <= size
            assert len(found) == size or touches  # smaller only where the border cuts it


def test_cutout_area_in_the_middle_is_its_size_squared() -> None:
    cut = augment.cutout(x := torch.ones(300, 1, 20, 20), draws(x), 6)[:, 0] == 0
    inside = ~(cut[:, 0].any(1) | cut[:, -1].any(1) | cut[:, :, 0].any(1) | cut[:, :, -1].any(1))
    assert int(inside.sum()) > 50
    assert set(cut[inside].sum(dim=(1, 2)).tolist()) == {36}


def test_colour_jitter_of_grey_images_has_no_colour() -> None:
    x = batch(c=1).expand(-1, 3, -1, -1).contiguous()
    changed = augment.color_jitter(x, draws(x), 0.5)
    assert torch.allclose(changed[:, 0], changed[:, 1], atol=1e-5)
    assert torch.allclose(changed[:, 0], changed[:, 2], atol=1e-5)


def test_colour_jitter_stays_within_its_strength() -> None:
    x = batch(64)
    changed = augment.color_jitter(x, draws(x), 0.3)
    moved = changed.mean(dim=(1, 2, 3)) - x.mean(dim=(1, 2, 3))
    assert moved.abs().max() <= 0.3 + 1e-5
    assert moved.abs().max() > 0.2
    grey = changed.mean(dim=1).std(dim=(1, 2)) / x.mean(dim=1).std(dim=(1, 2))
    assert (grey > 0.7 - 1e-3).all()
    assert (grey < 1.3 + 1e-3).all()


def test_soft_labels() -> None:
    hard = augment.soft_labels(torch.tensor([2, 0]), 3)
    assert hard.tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert augment.soft_labels(hard, 3) is hard


@quick
@given(st.floats(0.01, 20), st.integers(0, 2**32))
def test_beta_is_a_share_and_a_function_of_the_generator(alpha: float, seed: int) -> None:
    x = batch(1)
    share = draws(x, seed).beta(alpha)
    assert 0 <= share <= 1
    assert draws(x, seed).beta(alpha) == share


def test_beta_has_the_moments_of_beta() -> None:
    one = draws(batch(1))
    for alpha in (0.3, 1.0, 4.0):
        shares = torch.stack([one.beta(alpha) for _ in range(1500)])
        assert abs(float(shares.mean()) - 0.5) < 0.04
        assert float(shares.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


@quick
@given(st.sampled_from(sorted(MIXERS)), st.floats(0.05, 5), st.integers(0, 2**32), st.integers(1, 9))
def test_mixed_labels_sum_to_1(name: str, alpha: float, seed: int, n: int) -> None:
    x, y = batch(n), torch.arange(n) % 3
    _, mixed = MIXERS[name](x, y, draws(x, seed), alpha, 3)
    assert torch.allclose(mixed.sum(dim=1), torch.ones(n), atol=1e-5)
    assert mixed.min() >= 0
    again = MIXERS["cutmix"](x, mixed, draws(x, seed + 1), alpha, 3)[1]  # one after the other
    assert torch.allclose(again.sum(dim=1), torch.ones(n), atol=1e-5)


def one_image_a_class(n: int, side: int = 10) -> tuple[Tensor, Tensor]:
    """Image i has the value i everywhere; label i."""
    return torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 2, side, side).contiguous(), torch.arange(n)


def test_mixup_mixes_images_as_labels() -> None:
    x, y = one_image_a_class(6)
    mixed, labels = augment.mixup(x, y, draws(x, 3), 1.0, 6)
    values = labels @ torch.arange(6.0)
    assert torch.allclose(mixed, values.view(6, 1, 1, 1).expand_as(mixed), atol=1e-5)
    assert 0 < float(labels[0].max()) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_mixes_labels_as_pixels(seed: int) -> None:
    x, y = one_image_a_class(6)
    mixed, labels = augment.cutmix(x, y, draws(x, seed), 1.0, 6)
    for i in range(6):
        shares = torch.stack([(mixed[i, 0] == k).float().mean() for k in range(6)])
        assert torch.allclose(labels[i], shares, atol=1e-6)
    assert torch.equal(mixed[:, 0], mixed[:, 1])


# batches


def numbered(n: int = 23) -> Split:
    """Image i has the value i everywhere; its label is i % 5."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous()
    return Split(images=images, labels=torch.arange(n) % 5, ids=[str(i) for i in range(n)])


def plain(x: Tensor, y: Tensor, d: BatchRandom) -> tuple[Tensor, Tensor]:
    return x, y


def noisy(x: Tensor, y: Tensor, d: BatchRandom) -> tuple[Tensor, Tensor]:
    return augment.mixup(augment.translate(x, d, 1), y, d, 1.0, 5)


def batches(
    augmenting: Callable[..., tuple[Tensor, Tensor]] = plain,
    seed: int = 0,
    n: int = 23,
    size: int = 5,
    ranks: World | None = None,
) -> BatchLoader:
    unit = Normalize((0.0,) * 3, (1 / 255,) * 3)  # keeps the values 0..255
    return BatchLoader(numbered(n), size, unit, seed=seed, augment=augmenting, world=ranks)


def order_of(loader: BatchLoader, epoch: int) -> list[int]:
    return [round(float(v)) for i in range(len(loader)) for v in loader(epoch, i)[0][:, 0, 0, 0]]


@quick
@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**31), st.integers(0, 1000))
def test_an_epoch_is_a_permutation(n: int, size: int, seed: int, epoch: int) -> None:
    loader = batches(seed=seed, n=n, size=size)
    assert len(loader) == -(-n // size)
    parts = [loader(epoch, i) for i in range(len(loader))]
    assert [len(labels) for _, labels in parts] == [size] * (n // size) + [n % size] * (n % size > 0)
    order = [round(float(v)) for images, _ in parts for v in images[:, 0, 0, 0]]
    assert sorted(order) == list(range(n))
    assert [int(v) for _, labels in parts for v in labels] == [i % 5 for i in order]


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(order_of(batches(seed=seed), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(23)) not in orders
    loader = batches()
    assert order_of(loader, 1) == order_of(batches(), 1)


def test_a_batch_is_a_function_of_epoch_and_index_in_any_order() -> None:
    loader = batches(noisy)
    straight = {(e, i): loader(e, i) for e in range(3) for i in range(len(loader))}
    mixed = sorted(straight, key=lambda key: (key[1] * 7 + key[0] * 3) % 11)
    for fresh in (loader, batches(noisy)):
        for epoch, index in mixed:
            torch.manual_seed(epoch + 100)
            images, labels = fresh(epoch, index)
            assert torch.equal(images, straight[epoch, index][0])
            assert torch.equal(labels, straight[epoch, index][1])


def test_augmentation_differs_from_batch_to_batch_and_epoch_to_epoch() -> None:
    drawn: list[float] = []

    def draw(x: Tensor, y: Tensor, d: BatchRandom) -> tuple[Tensor, Tensor]:
        drawn.append(float(d.uniform()[0]))
        return x, y

    loader = batches(draw)
    for epoch in range(4):
        for index in range(len(loader)):
            loader(epoch, index)
    assert len(set(drawn)) == len(drawn) == 20


def test_a_batch_seeds_the_global_generator_for_dropout() -> None:
    loader = batches()
    numbers = []
    for epoch, index in ((0, 0), (0, 1), (1, 0), (0, 0)):
        loader(epoch, index)
        numbers.append(float(torch.rand(1)))
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 3


@quick
@given(st.integers(1, 60), st.integers(1, 7))
def test_the_parts_of_the_ranks_are_the_batch(n: int, ranks: int) -> None:
    parts = [World(rank, ranks).local_slice(n) for rank in range(ranks)]
    if n < 2 * ranks:  # too few to share
        assert parts == [slice(0, n)] * ranks
        return
    assert [row for part in parts for row in range(n)[part]] == list(range(n))
    assert all(part.start % 2 == 0 and part.stop - part.start >= 2 for part in parts)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_get_their_part_of_the_same_batches(ranks: int) -> None:
    whole = batches(noisy, n=40, size=13)
    shared = [batches(noisy, n=40, size=13, ranks=World(rank, ranks)) for rank in range(ranks)]
    for epoch in range(2):
        for index in range(len(whole)):
            images, labels = whole(epoch, index)
            parts = [one(epoch, index) for one in shared]
            assert torch.equal(torch.cat([part[0] for part in parts]), images)
            assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_batches_are_normalised_channels_last_and_the_split_is_not_touched() -> None:
    split = numbered()
    before = split.images.clone()

    def harsh(x: Tensor, y: Tensor, d: BatchRandom) -> tuple[Tensor, Tensor]:
        return x.zero_(), y.zero_()

    BatchLoader(split, 5, Normalize((0.5,) * 3, (0.5,) * 3), seed=0, augment=harsh)(0, 0)
    assert torch.equal(split.images, before)
    assert torch.equal(split.labels, torch.arange(23) % 5)
    loader = BatchLoader(split, 5, Normalize((0.5,) * 3, (0.5,) * 3), seed=0, augment=plain)
    images, labels = loader(0, 0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.min() >= -1
    assert images.max() < -0.8  # the values 0..22 of 255
