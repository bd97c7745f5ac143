"""A model in this process, for batches: `LLM("model.gguf").generate(["Once upon a"], SamplingParams(max_tokens=64))`.

No service, no streams: text or token ids in, all results at the end. What is generated is what the service would
generate, for it is the same tokenizer, chat template, engine and stop rules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nibble.engine import offline
from nibble.engine.errors import RequestError
from nibble.engine.llm_engine import LLMEngine
from nibble.engine.protocol import FinishReason, GenerationRequest, SamplingParams, TokenEvent
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.plan import Plan
from nibble.service.gateway.served_model import ServedModel, load_served_model
from nibble.service.launcher.model import locate_model
from nibble.service.launcher.settings import LauncherSettings
from nibble.service.worker.device import engine_limits, make_kernels, uses_cuda
from nibble.service.worker.settings import WorkerSettings

__all__ = ["LLM", "Output", "SamplingParams"]

Messages = Sequence[Mapping[str, Any]]
OneOrEach = SamplingParams | Sequence[SamplingParams]


@dataclass(frozen=True)
class Output:
    """What was generated for one prompt. prompt: its text, None where token ids were given.

    text has no special tokens and ends before a stop string; token_ids are all that were generated. error says why
    where finish_reason is "error": that prompt failed, and no other. completion: as the engine gave it, with metrics
    and, where they were asked for, log probabilities.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    error: str | None
    completion: offline.Completion


class _Prompt(NamedTuple):
    text: str | None
    token_ids: list[int]


class _Rules(NamedTuple):
    """What is the same for all prompts of a call."""

    stops: tuple[str, ...]
    ignore_eos: bool
    show_progress: bool
    continues_prompt: bool


class LLM:
    """One model on one device. For one caller at a time."""

    def __init__(self, model: str | Path | None = None, **settings: Any) -> None:
        """model: a GGUF file, a directory or an id on the hub; the demo model without it. settings: those of a worker,
        by name (`device="cpu"`, `kv_cache_bytes="1GiB"`); others come from NIBBLE_ variables, as everywhere.

        Raises SettingsError, ModelNotFound, ModelFilesError, CheckpointError, CapacityError.
        """
        cache_dir = LauncherSettings.from_environment().cache_dir
        directory, _ = locate_model(Path(model) if model is not None else None, cache_dir, Console(stderr=True))
        worker = WorkerSettings.from_environment(model_dir=directory, **settings)
        is_cuda = uses_cuda(worker)
        kernels = make_kernels(worker, is_cuda)
        self.model: ServedModel = load_served_model(directory)
        self.engine = LLMEngine.from_checkpoint(directory, kernels, engine_limits(worker, is_cuda))
        kernels.warm_up([self.engine.runner.model.kv_layout])

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        sampling: OneOrEach,
        *,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        show_progress: bool = True,
    ) -> list[Output]:
        """Continue each prompt; the outputs are in the order of the prompts.

        A text begins with what the tokenizer begins a text with; token ids are taken as they are. sampling: for all,
        or one for each; prompts with the same seed draw the same random numbers. stop: a text ends before any of
        these. Raises RequestError, before anything is computed, if a prompt or its sampling is not acceptable.
        """
        each = [prompts] if isinstance(prompts, str) else prompts
        batch = [
            _Prompt(prompt, self.model.encode(prompt, add_special_tokens=True))
            if isinstance(prompt, str)
            else _Prompt(None, list(prompt))
            for prompt in each
        ]
        return self._run(batch, sampling, _Rules(_stops(stop), ignore_eos, show_progress, continues_prompt=True))

    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        sampling: OneOrEach,
        *,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        show_progress: bool = True,
    ) -> list[Output]:
        """Answer each conversation, or the only one: messages with `role` and `content`, through the chat template.

        As `generate` otherwise. Raises RequestError, ChatTemplateError.
        """
        template = self.model.chat_template
        if template is None:
            raise RequestError(f"the model {self.model.name} has no chat template")
        is_one = bool(conversations) and isinstance(conversations[0], Mapping)
        each = cast(Sequence[Messages], [conversations] if is_one else conversations)
        if not all(each):
            raise RequestError("a conversation has no messages")
        texts = [template.render(messages) for messages in each]
        batch = [_Prompt(text, self.model.encode(text)) for text in texts]
        return self._run(batch, sampling, _Rules(_stops(stop), ignore_eos, show_progress, continues_prompt=False))

    def _run(self, prompts: list[_Prompt], sampling: OneOrEach, rules: _Rules) -> list[Output]:
        requests = self._requests(prompts, sampling, rules)
        for request in requests:
            self.engine.check(request)  # before there is a bar
        choices = [_choice(request, self.model, rules) for request in requests]
        texts = [""] * len(requests)
        with _progress(len(requests), rules.show_progress) as progress:

            def on_event(index: int, event: TokenEvent) -> bool:
                texts[index] += choices[index].push(event)
                is_done = choices[index].finish_reason is not None
                progress(len(event.token_ids), is_done)
                return is_done

            completions = offline.generate(self.engine, requests, on_event)
        return [
            Output(*prompt, text, done.token_ids, _reason(choice), done.error, done)
            for prompt, text, choice, done in zip(prompts, texts, choices, completions, strict=True)
        ]

    def _requests(self, prompts: list[_Prompt], sampling: OneOrEach, rules: _Rules) -> list[GenerationRequest]:
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        if len(each) != len(prompts):
            raise RequestError(f"there are {len(prompts)} prompts and {len(each)} sampling parameters")
        eos = () if rules.ignore_eos else self.model.eos_token_ids
        now_s = time.time()
        return [
            GenerationRequest(
                request_id=str(index),
                prompt_token_ids=prompt.token_ids,
                sampling=msgspec.structs.replace(one, stop_token_ids=tuple({*one.stop_token_ids, *eos})),
                arrival_s=now_s,
            )
            for index, (prompt, one) in enumerate(zip(prompts, each, strict=True))
        ]


def _choice(request: GenerationRequest, model: ServedModel, rules: _Rules) -> Choice:
    """What turns the tokens into text in the gateway, and knows its stop rules."""
    plan = Plan(
        request_id=request.request_id,
        arrival_s=request.arrival_s,
        first_token_by_s=None,
        requests=(request,),
        prompt_tokens=len(request.prompt_token_ids),
        num_prompts=1,
        stops=rules.stops,
        include_stop=False,
        skip_special_tokens=True,
        stream=False,
        include_usage=False,
        service_tier="",
        ignored=(),
        continues_prompt=rules.continues_prompt,
    )
    return Choice(plan, model.make_detokenizer(True))


def _reason(choice: Choice) -> FinishReason:
    assert choice.finish_reason is not None, "every request ends with a last event"
    return choice.finish_reason


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stops):
        raise RequestError("a stop string is empty")
    return stops


@contextmanager
def _progress(num_requests: int, is_shown: bool) -> Iterator[Callable[[int, bool], None]]:
    """A bar of finished requests, on stderr; tell it of new tokens, and whether a request is done."""
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens, {task.fields[rate]:.0f}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as progress:
        task = progress.add_task("generating", total=num_requests, tokens=0, rate=0.0)
        num_tokens, start_s = 0, time.perf_counter()

        def report(num_new: int, is_done: bool) -> None:
            nonlocal num_tokens
            num_tokens += num_new
            if is_shown:
                rate = num_tokens / (time.perf_counter() - start_s)
                progress.update(task, advance=int(is_done), tokens=num_tokens, rate=rate)

        yield report
