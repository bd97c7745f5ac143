"""One compiler for all: a matcher never changes it."""

from __future__ import annotations

import pytest
from tiny_tokenizer import write_tiny_tokenizer
from walk import make_compiler

from nibble.grammar.compiler import GrammarCompiler


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return make_compiler(directory)
