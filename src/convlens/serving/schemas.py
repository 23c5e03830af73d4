"""The JSON schemas of the HTTP API."""

from typing import Any

from pydantic import BaseModel, Field

from convlens.inference.predictor import Prediction


class ErrorResponse(BaseModel):
    """Why a request failed."""

    detail: str


class ClassProbability(BaseModel):
    """A class and its probability."""

    label: str
    confidence: float = Field(ge=0, le=1)


class PredictResponse(ClassProbability):
    """The prediction for one image."""

    in_distribution: bool | None = Field(description="Is the image like the training data? null: the model cannot say.")
    top: list[ClassProbability] = Field(description="The most probable classes, best first.")
    prediction_set: list[str] | None = Field(description="Classes that contain the true one at the rate of `coverage`.")

    @classmethod
    def of(cls, prediction: Prediction) -> "PredictResponse":
        """Return the response for a prediction."""
        top = [ClassProbability(label=label, confidence=probability) for label, probability in prediction.top]
        labels = None if prediction.prediction_set is None else list(prediction.prediction_set)
        return cls(**top[0].model_dump(), in_distribution=prediction.in_distribution, top=top, prediction_set=labels)


class PredictResponses(BaseModel):
    """The predictions for all images of a request, in their order."""

    model: str
    predictions: list[PredictResponse]


class ExplainResponse(ClassProbability):
    """The prediction for one image, and an occlusion map (Zeiler & Fergus 2014)."""

    model: str
    in_distribution: bool | None
    about: str = Field(description="The class that the map is about.")
    occlusion: list[list[float]] = Field(
        description="For each pixel of the model's input, row by row: how much the probability of `about` falls when "
        "a square covers it, -1 to 1."
    )


class ModelInfo(BaseModel):
    """A model of this server."""

    name: str
    classes: list[str]
    channels: int
    height: int
    width: int
    coverage: bool = Field(description="Can it return prediction sets?")
    training: dict[str, Any] = Field(description="What it was trained on, and its test results.")
