"""docs/api.md names every field that the schemas have, and says what becomes of each."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from nibble.service.gateway.schema.chat import ChatCompletionRequest
from nibble.service.gateway.schema.responses import ResponseRequest
from nibble.service.gateway.schema.sampling import SamplingBody
from nibble.service.gateway.schema.text import CompletionRequest

DOCS = Path(__file__).parents[3] / "docs" / "api.md"


@pytest.mark.parametrize(
    ("title", "model"), [("Both endpoints", SamplingBody), ("Chat", ChatCompletionRequest), ("Text", CompletionRequest)]
)
def test_every_field_is_in_its_table(title: str, model: type[SamplingBody]) -> None:
    section = DOCS.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)", row)}
    inherited = set() if model is SamplingBody else set(SamplingBody.model_fields)
    own = set(model.model_fields) - inherited
    assert own <= named
    assert named <= set(model.model_fields)


def test_the_table_of_all_fields_is_that_of_the_schemas() -> None:
    """`make docs` writes it."""
    script = runpy.run_path(str(DOCS.with_name("field_table.py")))
    assert DOCS.read_text() == script["page"]()
    assert "| `suffix` | string |  | rejected |  |" in DOCS.read_text()


@pytest.mark.parametrize(
    ("sdk", "model"),
    [
        (chat_params.CompletionCreateParamsBase, ChatCompletionRequest),
        (text_params.CompletionCreateParamsBase, CompletionRequest),
        (response_create_params.ResponseCreateParamsBase, ResponseRequest),
    ],
)
def test_every_parameter_of_the_official_client_is_known(sdk: type, model: type[BaseModel]) -> None:
    """Thus in the table, with what becomes of it."""
    assert set(sdk.__annotations__) <= set(model.model_fields)
