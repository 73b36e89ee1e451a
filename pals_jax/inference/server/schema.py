"""The JSON of requests and responses."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError, model_validator

from pals_jax.data.tasks import Task
from pals_jax.inference.predict import Prediction

Pair = Annotated[list[StrictStr], Field(min_length=2, max_length=2)]
Example = StrictStr | Pair
Name = Annotated[StrictStr, Field(min_length=1)]
MOST = 1024  # elements of an array
Several = Field(min_length=1, max_length=MOST, fail_fast=True)


class Question(BaseModel):
    """Texts to answer: `text` is one text or one pair, `texts` a list of either."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"text": "The soup was cold.", "task": "all"},
                {"texts": [["The soup was cold.", "It was hot."]], "task": ["entailment"]},
            ]
        },
    )

    text: Example | None = Field(None, description="One text, or a pair as an array of two.")
    texts: Annotated[list[Example], Several] | None = Field(
        None, description="Several texts, or several pairs."
    )
    task: Name | Annotated[list[Name], Several] = Field(
        description='A task, an array of several, or "all" for every task that the texts fit.'
    )

    @model_validator(mode="after")
    def _one_of_the_two(self) -> "Question":
        if (self.text is None) == (self.texts is None):
            raise ValueError("give text, for one, or texts, for several")
        return self

    def examples(self) -> list[tuple[str, ...]]:
        """The texts and pairs."""
        given = [self.text] if self.texts is None else self.texts
        return [(x,) if isinstance(x, str) else tuple(x) for x in given if x is not None]


class Answer(BaseModel):
    """The answer of one task: a label with the probability of each, or a value."""

    task: str
    label: str | None = Field(description="The most probable label; null for a regression.")
    probabilities: dict[str, float] = Field(description="Of each label; empty for a regression.")
    value: float | None = Field(description="The predicted number; null for a classification.")

    @classmethod
    def of(cls, prediction: Prediction) -> "Answer":
        """The answer that a prediction is."""
        return cls(
            task=prediction.task,
            label=prediction.label,
            probabilities=prediction.probabilities,
            value=prediction.value,
        )


class Answers(BaseModel):
    """For each text, in the order of the request, the answers of its tasks."""

    answers: list[list[Answer]]


class TaskInfo(BaseModel):
    """A task that is served."""

    name: str
    texts: list[str] = Field(description="What its texts are; empty if it takes one or two.")
    labels: list[str] = Field(description="Its labels; empty for a regression.")
    range: tuple[float, float] | None = Field(description="Of a regression's values, if known.")

    @classmethod
    def of(cls, task: Task) -> "TaskInfo":
        """What there is to know of a task."""
        return cls(
            name=task.name,
            texts=list(task.text),
            labels=list(task.labels),
            range=task.label_range,
        )


class Tasks(BaseModel):
    """All tasks, the oldest first, and how many there may be."""

    tasks: list[TaskInfo]
    max_tasks: int
    administration: bool = Field(description="Whether tasks may be added and removed.")


class Error(BaseModel):
    """Why there is no answer, in one sentence."""

    error: str


_MUST_BE = {
    "text": "a string, or an array of two strings",
    "texts": f"an array of 1 to {MOST} texts, each a string or an array of two strings",
    "task": 'the name of a task, an array of names, or "all"',
}


def sentence(error: ValidationError) -> str:
    """What is wrong with a request, in one sentence that repeats nothing of its texts."""
    first: Any = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, message, (place, *inside) = first["type"], first["msg"], first["loc"] or [""]
    if kind == "json_invalid":
        return f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}."
    if kind == "value_error":
        return f"{message.removeprefix('Value error, ')}."
    if kind == "extra_forbidden" or place not in _MUST_BE:
        return "the body must be a JSON object with text or texts, and task, and nothing else."
    number = next((f"; number {i + 1} is not" for i in inside if isinstance(i, int)), "")
    return f"{place} must be {_MUST_BE[place]}{number}."
