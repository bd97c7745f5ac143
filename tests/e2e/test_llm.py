"""The model as a library gives the text that the service gives, and says what is wrong with what it is given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest
from running_service import RunningService

from nibble.engine.errors import RequestError
from nibble.engine.protocol import FinishReason
from nibble.llm import LLM, Output, SamplingParams
from nibble.service.settings import SettingsError

QUESTIONS = [f"{ask} {what}?" for ask in ("What is", "Who likes") for what in ("rain", "a moon", "chess", "Rome")]
BEGINNINGS = ["The capital of France is", "Once upon a time, ", "def add(a, b):\n", "1, 2, 3,"]


@pytest.fixture(scope="module")
def llm(demo_checkpoint: Path) -> LLM:
    return LLM(demo_checkpoint, device="cpu", kv_cache_bytes="16MiB", max_num_sequences=3)


def greedy(max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def results(outputs: list[Output]) -> list[tuple[str, str]]:
    return [(output.text, output.finish_reason) for output in outputs]


@pytest.mark.parametrize("stop", [None, [".", " the"]])
def test_texts_are_those_of_the_service(
    llm: LLM, run_service: Callable[..., AbstractContextManager[RunningService]], stop: list[str] | None
) -> None:
    chats, texts = [], []
    with run_service() as service, service.client() as client:
        given = {"model": "demo", "temperature": 0, "max_tokens": 24, "stop": stop or openai.NOT_GIVEN}
        for question in QUESTIONS:
            choice = client.chat.completions.create(messages=[{"role": "user", "content": question}], **given).choices[
                0
            ]  # type: ignore[call-overload]  # options of both clients in one dict
            chats.append((choice.message.content, choice.finish_reason))
        for beginning in BEGINNINGS:
            choice = client.completions.create(prompt=beginning, **given).choices[0]  # type: ignore[call-overload]  # as above
            texts.append((choice.text, choice.finish_reason))
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    assert results(llm.chat(conversations, greedy(), stop=stop or ())) == chats
    assert results(llm.generate(BEGINNINGS, greedy(), stop=stop or ())) == texts
    assert {reason for _, reason in chats} == {"stop" if stop else "length"}


def test_token_ids_and_one_prompt_alone_give_the_same(llm: LLM) -> None:
    outputs = llm.generate(BEGINNINGS, greedy(8))
    assert [output.prompt for output in outputs] == BEGINNINGS
    ids = [output.prompt_token_ids for output in outputs]
    assert results(llm.generate(ids, greedy(8))) == results(outputs)
    assert llm.generate(ids, greedy(8))[0].prompt is None
    assert results(llm.generate(BEGINNINGS[0], greedy(8))) == results(outputs[:1])
    message = {"role": "user", "content": QUESTIONS[0]}
    assert results(llm.chat([message], greedy(8))) == results(llm.chat([[message]], greedy(8)))


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    sampling = [SamplingParams(max_tokens=n, seed=n) for n in (1, 9, 4, 6)]
    outputs = llm.generate(BEGINNINGS, sampling, ignore_eos=True)
    assert [len(output.token_ids) for output in outputs] == [1, 9, 4, 6]
    assert {output.finish_reason for output in outputs} == {FinishReason.LENGTH}
    assert results(llm.generate(BEGINNINGS, sampling, ignore_eos=True)) == results(outputs)


def test_the_progress_bar_is_on_stderr_and_can_be_switched_off(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(BEGINNINGS, greedy(2), show_progress=False)
    assert capsys.readouterr() == ("", "")
    llm.generate(BEGINNINGS, greedy(2))
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4 8 tokens" in err


def test_what_cannot_be_run_is_an_error_that_says_why(llm: LLM) -> None:
    for prompts, options, message in (
        (["x", []], {}, "the prompt is empty"),
        ([[1 << 20]], {}, "token id 1048576 is outside the vocabulary"),
        (["word " * 9000], {}, "prompt has 9001 tokens, the limit is"),
        (["x"], {"temperature": -1.0}, "temperature is -1.0, the limits are 0.0 and 100.0"),
        (["x"], {"top_p": 0.0}, "top_p is 0.0, it must be above 0 and at most 1"),
        (["x"], {"max_tokens": 0}, "max_tokens is 0, the least is 1"),
        (["x"], {"repetition_penalty": -1.0}, "repetition_penalty"),
    ):
        sampling = SamplingParams(**{"max_tokens": 2, **options})  # type: ignore[arg-type]
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, sampling)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="there are 1 prompts and 2 sampling parameters"):
        llm.generate("x", [greedy(), greedy()])
    with pytest.raises(RequestError, match="a stop string is empty"):
        llm.generate("x", greedy(), stop=["a", ""])
    with pytest.raises(RequestError, match="no messages"):
        llm.chat([[]], greedy())


def test_a_setting_that_no_worker_has_is_an_error(demo_checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="NIBBLE_MAX_NUM_SEQUENCES"):
        LLM(demo_checkpoint, max_num_sequences=0)
    with pytest.raises(SettingsError, match="NIBBLE_MAX_SEQS"):
        LLM(demo_checkpoint, max_seqs=3)
