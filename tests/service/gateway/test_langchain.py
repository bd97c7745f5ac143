"""LangChain's standard tests of chat models, through `langchain-openai`. The worker always answers the same."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import RunningGateway

tests = pytest.importorskip("langchain_tests.integration_tests", reason="make test-conformance installs it")
ChatOpenAI = pytest.importorskip("langchain_openai").ChatOpenAI


@pytest.mark.conformance
@pytest.mark.asyncio(loop_scope="module")  # clients are kept from test to test
class TestChatOpenAI(tests.ChatModelIntegrationTests):  # type: ignore[name-defined,misc]
    @property
    def chat_model_class(self) -> type[Any]:
        return ChatOpenAI  # type: ignore[no-any-return]

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "small", "api_key": "none", "max_retries": 0, "stream_usage": True}

    @property
    def has_tool_calling(self) -> bool:
        """They want a call that a fixed answer is not; tests of tools are in test_tools.py."""
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @pytest.fixture(autouse=True)
    def served(self, running: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
        running.reply_with("hello there")
        monkeypatch.setenv("OPENAI_API_BASE", f"{running.url}/v1")
