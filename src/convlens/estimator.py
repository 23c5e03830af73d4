"""ConvClassifier: an estimator for scikit-learn's ``cross_val_score``, ``GridSearchCV``, ``Pipeline`` and others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from convlens.data.dataset import Dataset, IndexIds, Split
from convlens.data.images import InputStyle
from convlens.data.preprocess import Preprocess
from convlens.evaluation.inference import compute_logits
from convlens.training.build import make_model, model_config
from convlens.training.loop import fit
from convlens.training.recipe import Recipe


class ConvClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A small convolutional network as a scikit-learn classifier: trained on the CPU, in fp32, with nothing held out.

    Images ``X`` are (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3, or (N, features): rows of pixels, square if
    the number of features is a square, else one row high. Any real numbers are accepted; the smallest and largest seen
    in :meth:`fit` become black and white. Labels ``y`` are (N,), of any kind.

    Args:
        model: See :class:`convlens.Recipe`, as for all but ``random_state``.
        width: See ``model``.
        epochs: See ``model``.
        batch_size: See ``model``.
        optimizer: See ``model``.
        lr: See ``model``.
        weight_decay: See ``model``.
        translate: See ``model``.
        hflip: See ``model``.
        rotation: See ``model``.
        random_state: The seed: an integer from 0, a NumPy RandomState, or None for another one at each fit.

    Attributes:
        classes_: The labels (K,), sorted.
        model_: The trained model, an ``nn.Module``.

    >>> X, y = np.zeros((20, 4, 4)), np.arange(20) % 2
    >>> X[y == 1, 1:3, 1:3] = 1  # class 1 has a bright middle
    >>> classifier = ConvClassifier(epochs=20, width=4, random_state=0).fit(X, y)
    >>> classifier.score(X, y)
    1.0
    >>> classifier.predict_proba(X).shape
    (20, 2)
    """

    def __init__(
        self,
        *,
        model: str = "small",
        width: int | None = 16,
        epochs: int = 30,
        batch_size: int = 64,
        optimizer: str = "adamw",
        lr: float = 0.01,
        weight_decay: float = 0.01,
        translate: int = 0,
        hflip: bool = False,
        rotation: float = 0.0,
        random_state: Any = None,
    ):
        self.model = model
        self.width = width
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.translate = translate
        self.hflip = hflip
        self.rotation = rotation
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.classifier_tags.poor_score = False
        return tags

    def fit(self, X: ArrayLike, y: ArrayLike) -> ConvClassifier:
        """Train a new model on images ``X`` (N, ...) and labels ``y`` (N,).

        PyTorch's random state is restored afterwards.

        Returns:
            The estimator itself.

        Raises:
            ValueError: The images or labels are invalid, such as labels of one class only.
            UsageError: A parameter has a value that the recipe does not take.
        """
        X, y = validate_data(self, X, y, allow_nd=True, dtype="numeric", ensure_min_samples=1)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {self.classes_[0]!r}; a classifier needs at least two")
        values = np.asarray(X, dtype=np.float64)
        self.low_, self.high_ = float(values.min()), float(values.max())
        images = self._to_pixels(values)
        self.preprocess_ = Preprocess.fit(images, InputStyle())
        recipe = Recipe(
            model=self.model,
            width=self.width,
            val_fraction=0.0,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            translate=self.translate,
            hflip=self.hflip,
            rotation=self.rotation,
            seed=self._seed(),
            device="cpu",
            precision="fp32",
        )
        train = Split(images=images, labels=torch.from_numpy(numbers.astype(np.int64)), ids=IndexIds(len(images)))
        dataset = Dataset(
            name="arrays",
            source=None,
            classes=tuple(map(str, self.classes_)),
            train=train,
            test=train.select(torch.arange(0)),  # scikit-learn evaluates
            validation=None,
            input_style=InputStyle(),
            split_description="",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = make_model(model_config(recipe, dataset), dataset, self.preprocess_)
            for _ in fit(model, dataset, recipe, preprocess=self.preprocess_):
                pass
        self.model_ = model
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float32]:
        """Return the probability of every class, float32 (N, K), in the order of ``classes_``; not calibrated.

        Raises:
            NotFittedError: The estimator is not fitted.
            ValueError: The images have another size than those of :meth:`fit`.
        """
        check_is_fitted(self, "model_")
        X = validate_data(self, X, reset=False, allow_nd=True, dtype="numeric")
        images = self._to_pixels(np.asarray(X, dtype=np.float64))
        expected = (self.preprocess_.channels, self.preprocess_.height, self.preprocess_.width)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images of (C, H, W) {tuple(images.shape[1:])}, but fit saw images of shape {expected}")
        logits = compute_logits(self.model_, images, self.preprocess_.normalizer())
        return logits.softmax(dim=1).cpu().numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most probable label, of the type of ``y``, of each of the images (N, ...).

        Raises:
            NotFittedError: The estimator is not fitted.
            ValueError: The images have another size than those of :meth:`fit`.
        """
        best = self.predict_proba(X).argmax(axis=1)
        return self.classes_[best]  # type: ignore[no-any-return]

    def _seed(self) -> int:
        from sklearn.utils import check_random_state

        if isinstance(self.random_state, (int, np.integer)):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _to_pixels(self, values: NDArray[np.float64]) -> torch.Tensor:
        """Return images as uint8 (N, C, H, W); values outside the range seen in fit are clipped."""
        if values.ndim == 2:
            side = int(values.shape[1] ** 0.5)
            shape = (side, side) if side * side == values.shape[1] else (1, values.shape[1])
            values = values.reshape(len(values), 1, *shape)
        elif values.ndim == 3:
            values = values[:, None]
        elif values.shape[3] in (1, 3) and values.shape[1] not in (1, 3):
            values = values.transpose(0, 3, 1, 2)
        if values.ndim != 4 or values.shape[1] not in (1, 3):
            raise ValueError(
                f"images of shape {values.shape}: give (N, H, W), (N, H, W, C), (N, C, H, W) or (N, features)"
            )
        scale = 255 / max(self.high_ - self.low_, 1e-12)
        return torch.from_numpy(np.round((values - self.low_) * scale).clip(0, 255).astype(np.uint8))
