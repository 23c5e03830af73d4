"""The JSON schemas of the HTTP API."""

from typing import Any

from pydantic import BaseModel, Field

from convlens.inference.predictor import Prediction


class ErrorResponse(BaseModel):
    """Why there is no answer."""

    detail: str


class ClassProbability(BaseModel):
    """A class, and how probable it is."""

    label: str
    probability: float = Field(ge=0, le=1)


class PredictResponse(ClassProbability):
    """What the net says of one picture."""

    known: bool | None = Field(description="Does it look like what the net learned from? null: the net cannot say.")
    top: list[ClassProbability] = Field(description="The most probable classes, best first.")
    set: list[str] | None = Field(description="The classes that hold the right one as often as `coverage` asks.")

    @classmethod
    def of(cls, prediction: Prediction) -> "PredictResponse":
        """Return a prediction as the server sends it."""
        top = [ClassProbability(label=label, probability=share) for label, share in prediction.top]
        labels = None if prediction.prediction_set is None else list(prediction.prediction_set)
        return cls(**top[0].model_dump(), known=prediction.in_distribution, top=top, set=labels)


class PredictResponses(BaseModel):
    """What the net says of the pictures, in their order."""

    model: str
    predictions: list[PredictResponse]


class ExplainResponse(BaseModel):
    """What an answer hangs on."""

    model: str
    label: str = Field(description="The most probable class.")
    probability: float = Field(ge=0, le=1)
    known: bool | None
    about: str = Field(description="The class that the map is about.")
    occlusion: list[list[float]] = Field(
        description="For each pixel that the net sees, row by row, by how much the probability of `about` falls when a "
        "square covers it: -1 to 1."
    )


class ModelInfo(BaseModel):
    """A model of this server."""

    name: str
    classes: list[str]
    channels: int
    height: int
    width: int
    coverage: bool = Field(description="Can it name a set of classes that holds the right one as often as asked?")
    trained: dict[str, Any] = Field(description="What it was trained on, and how well it did on test images.")
