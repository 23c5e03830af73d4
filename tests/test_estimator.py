"""ConvClassifier keeps scikit-learn's contract, and takes images in every common layout."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from convlens import ConvClassifier
from convlens.errors import UsageError

# check -> why it makes no sense for images; there is none
EXPECTED_TO_FAIL: dict[str, str] = {}


@parametrize_with_checks([ConvClassifier(epochs=15, random_state=0)], expected_failed_checks=lambda _: EXPECTED_TO_FAIL)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def digits() -> tuple[NDArray[Any], NDArray[Any]]:
    """Return 400 of the embedded digits: (N, 8, 8) floats 0..16 and labels."""
    data = load_digits()
    return data.images[:400], data.target[:400]


def toy(n: int = 24, classes: int = 2, shape: tuple[int, ...] = (6, 6)) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return noise that is brighter for the later classes, (N, *shape), and labels."""
    y = np.arange(n) % classes
    noise = np.random.default_rng(0).integers(0, 60, (n, *shape))
    return noise + y.reshape(-1, *(1 for _ in shape)) * 90, y


def quick(**options: Any) -> ConvClassifier:
    return ConvClassifier(**{"epochs": 3, "width": 4, "random_state": 0, **options})


# with the rest of scikit-learn


def test_cross_validation(digits: tuple[NDArray[Any], NDArray[Any]]) -> None:
    scores = cross_val_score(ConvClassifier(epochs=4, random_state=0), *digits, cv=2)
    assert scores.shape == (2,)
    assert scores.mean() > 0.85


def test_pipeline(digits: tuple[NDArray[Any], NDArray[Any]]) -> None:
    x, y = digits
    flat = x.reshape(len(x), -1)
    model = make_pipeline(MinMaxScaler(), ConvClassifier(epochs=5, random_state=0)).fit(flat[:300], y[:300])
    assert model.score(flat[300:], y[300:]) > 0.85


def test_grid_search() -> None:
    x, y = toy(40)
    search = GridSearchCV(quick(epochs=2), {"lr": [0.0, 0.01], "hflip": [True]}, cv=2).fit(x, y)
    assert search.best_params_ == {"hflip": True, "lr": 0.01}


def test_parameters_drawn_by_numpy() -> None:
    # what a grid made by np.arange or np.linspace, or a random search, hands over
    x, y = toy()
    drawn = quick(epochs=np.int64(2), batch_size=np.int32(8), lr=np.float64(0.01), rotation=np.float32(0.0))
    plain = quick(epochs=2, batch_size=8, lr=0.01, rotation=0.0)
    np.testing.assert_array_equal(drawn.fit(x, y).predict_proba(x), plain.fit(x, y).predict_proba(x))


def test_clone_and_parameters() -> None:
    model = quick(lr=0.02, hflip=True, model="fashion-2conv")
    copy = clone(model)
    assert copy is not model and copy.get_params() == model.get_params()
    assert copy.set_params(lr=0.5).lr == 0.5 and model.lr == 0.02
    x, y = toy()
    fitted = quick().fit(x, y)
    with pytest.raises(NotFittedError):
        clone(fitted).predict_proba(x)


def test_before_fit() -> None:
    x, _ = toy()
    for method in ("predict", "predict_proba"):
        with pytest.raises(NotFittedError):
            getattr(quick(), method)(x)


def test_a_fit_that_failed_is_no_fit() -> None:
    x, y = toy()
    model = quick(model="mnist-4conv", width=None)  # too small images for it
    with pytest.raises(UsageError, match="too small"):
        model.fit(x, y)
    with pytest.raises(NotFittedError):
        model.predict_proba(x)


def test_pickle() -> None:
    x, y = toy()
    model = quick().fit(x, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(x), model.predict_proba(x))


# labels and probabilities


def test_labels_of_any_kind() -> None:
    x, y = toy(30, classes=3)
    names = np.array(["cat", "dog", "a much longer name"])
    model = quick(epochs=15, lr=0.03).fit(x, names[y])
    assert model.classes_.tolist() == sorted(names)
    assert model.predict(x).dtype == model.classes_.dtype
    assert model.score(x, names[y]) == 1.0
    numbers = quick(epochs=15, lr=0.03).fit(x, y * 10 - 7)
    assert numbers.classes_.tolist() == [-7, 3, 13]
    assert set(numbers.predict(x).tolist()) == {-7, 3, 13}
    assert quick(epochs=1).fit(x, y == 1).predict(x).dtype == bool


def test_probabilities() -> None:
    x, y = toy(30, classes=3)
    model = quick().fit(x, y)
    probabilities = model.predict_proba(x)
    assert probabilities.shape == (30, 3)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (probabilities >= 0).all()
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(axis=1)], model.predict(x))


def test_one_class_and_no_classes_are_refused() -> None:
    x, _ = toy()
    with pytest.raises(ValueError, match="y has one class, .*; a classifier needs at least two$"):
        quick().fit(x, np.zeros(len(x), dtype=int))
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        quick().fit(x, np.linspace(0, 1, len(x)))


# forms of X


def test_every_layout_is_the_same_pictures() -> None:
    x, y = toy(24, shape=(6, 6))
    forms = {"N H W": x, "N C H W": x[:, None], "N H W C": x[..., None], "flat": x.reshape(24, 36), "list": x.tolist()}
    answers = {name: quick().fit(form, y).predict_proba(form) for name, form in forms.items()}
    for answer in answers.values():
        np.testing.assert_array_equal(answer, answers["N H W"])


def test_colour_layouts_are_the_same_pictures() -> None:
    x, y = toy(24, shape=(3, 8, 10))
    first, last = quick().fit(x, y), quick().fit(x.transpose(0, 2, 3, 1), y)
    assert first.preprocess_.channels == last.preprocess_.channels == 3
    assert (first.preprocess_.height, first.preprocess_.width) == (8, 10)
    np.testing.assert_array_equal(first.predict_proba(x), last.predict_proba(x.transpose(0, 2, 3, 1)))


def test_rows_that_are_no_square_are_one_pixel_high() -> None:
    x, y = toy(24, shape=(35,))
    model = quick().fit(x, y)
    assert (model.preprocess_.height, model.preprocess_.width) == (1, 35)
    assert model.n_features_in_ == 35


def test_range_of_values_is_taken_from_training() -> None:
    x, y = toy()
    answers = [quick().fit(form, y).predict_proba(form) for form in (x, x / 255.0, x * 1000.0 - 7, -1.0 * x)]
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-6)
    np.testing.assert_allclose(answers[2], answers[0], atol=1e-6)
    assert not np.allclose(answers[3], answers[0])
    model = quick().fit(x, y)
    brighter = np.where(x == x.max(), 10**6, x)
    np.testing.assert_array_equal(model.predict_proba(brighter), model.predict_proba(x))


def test_pictures_of_one_grey() -> None:
    _, y = toy()
    probabilities = quick().fit(np.full((24, 6, 6), 3.0), y).predict_proba(np.full((1, 6, 6), 3.0))
    assert np.isfinite(probabilities).all()


@pytest.mark.parametrize("shape", [(24, 6, 6, 2), (24, 2, 3, 4, 5), (24, 6, 6, 5)])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"give \(N, H, W\), \(N, H, W, C\), \(N, C, H, W\) or \(N, features\)$"):
        quick().fit(np.zeros(shape), np.arange(24) % 2)


@pytest.mark.parametrize("shape", [(6, 6, 6), (6, 9), (1, 6, 9), (3, 6, 6)])
def test_images_of_another_size_than_those_of_fit_are_refused(shape: tuple[int, ...]) -> None:
    x, y = toy()
    model = quick().fit(x, y)
    with pytest.raises(ValueError, match="features|shape|size"):
        model.predict(np.zeros((2, *shape)))


def test_not_finite_and_missing_values_are_refused() -> None:
    x, y = toy()
    for bad in (np.nan, np.inf):
        spoilt = x.astype(float)
        spoilt[3, 2, 1] = bad
        with pytest.raises(ValueError, match="contains"):
            quick().fit(spoilt, y)
        with pytest.raises(ValueError, match="contains"):
            quick().fit(x, y).predict(spoilt)


@pytest.mark.parametrize("n", [64, 65])
def test_any_number_of_images_of_one_pixel(n: int) -> None:
    # 65 images are a batch of 64 and a batch of one
    x = np.arange(n, dtype=float).reshape(n, 1)
    assert quick(epochs=1).fit(x, np.arange(n) % 2).predict(x).shape == (n,)


# randomness


def test_random_state() -> None:
    x, y = toy()

    def answer(state: Any) -> NDArray[Any]:
        return quick(random_state=state).fit(x, y).predict_proba(x)

    np.testing.assert_array_equal(answer(5), answer(5))
    np.testing.assert_array_equal(answer(5), answer(np.int64(5)))
    assert not np.array_equal(answer(5), answer(6))
    np.testing.assert_array_equal(answer(np.random.RandomState(1)), answer(np.random.RandomState(1)))
    assert not np.array_equal(answer(None), answer(None))


def test_fitting_again_starts_anew() -> None:
    x, y = toy()
    model = quick().fit(x, y)
    first = model.predict_proba(x)
    np.testing.assert_array_equal(model.fit(x, y).predict_proba(x), first)


def test_the_callers_random_numbers_stay_as_they_are() -> None:
    x, y = toy()
    np.random.seed(3)
    torch.manual_seed(4)
    numpy_state, torch_state = np.random.get_state(legacy=False), torch.get_rng_state()
    quick(rotation=5.0, translate=1).fit(x, y).predict(x)
    np.testing.assert_equal(np.random.get_state(legacy=False), numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_callers_threads_stay_as_they_are() -> None:
    x, y = toy()
    before = torch.get_num_threads()
    quick().fit(x, y)
    assert torch.get_num_threads() == before


def test_data_are_not_changed() -> None:
    x, y = toy()
    copy_x, copy_y = x.copy(), y.copy()
    quick().fit(x, y).predict(x)
    np.testing.assert_array_equal(x, copy_x)
    np.testing.assert_array_equal(y, copy_y)
