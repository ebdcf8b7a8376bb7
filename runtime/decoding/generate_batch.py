"""`model.generate_batch` by the engine: transformers' signature and results, many prompts with in-flight batching."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from ..errors import InputError
from ..hooks import on_itself
from .generate import HOOKED, Decoding, Serves
from .processors import Untranslated, translate
from .requests import Request
from .served import TOKEN_BY_TOKEN

FROM_GENERATE = ("input_ids", "attention_mask")
"""What `generate(cache_implementation="paged")` hands on, beside the prompts themselves."""


class GenerateBatch:
    """The instance attribute `generate_batch`."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.__name__ = "generate_batch"
        self.__doc__ = type(decoding.model).generate_batch.__doc__

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own, bound."""
        bound: Callable[..., Any] = type(self.decoding.model).generate_batch.__get__(self.decoding.model)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """As transformers'. `persistent_manager` and `warmup` say nothing here: the engine stays, graphs are kept.

        Raises:
            InputError: a prompt that is no list of tokens, or has none, or can never fit; nothing was run.
        """
        if not inputs:
            return {}
        engine = self._engine(continuous_batching_config)
        requests: list[Request] | str
        if isinstance(engine, str):
            requests = engine
        else:
            try:
                requests = self._requests(inputs, generation_config, kwargs)
            except Untranslated as reason:
                requests = str(reason)
        if isinstance(requests, str) or isinstance(engine, str):
            self.decoding.say(f"{requests}: served by HuggingFace's generate_batch", "generate_batch")
            self.decoding.count("HuggingFace's generate_batch")
            return self.original(
                inputs,
                generation_config,
                continuous_batching_config,
                record_timestamps,
                progress_bar,
                persistent_manager,
                warmup,
                **kwargs,
            )
        with self.decoding.turn, _Progress(requests, progress_bar) as progress:
            outputs = engine.run(requests, on_token=progress.take)
        self.decoding.count("generate_batch")
        return progress.results(outputs, copies=len(requests) // len(inputs), stamped=record_timestamps)

    def _engine(self, config: Any) -> Serves | str:
        """The engine, or why another one has to serve."""
        reason = self.decoding.dispatch.unservable()
        if reason is not None:
            return reason
        if on_itself(self.decoding.model):
            return HOOKED
        if getattr(config, "return_logprobs", False):
            return "return_logprobs"
        if config is not None:
            text = "continuous_batching_config is for HuggingFace's engine"
            self.decoding.say(f"{text}; optimize(decoding=...) says what ours may take", "generate_batch")
        return self.decoding.engine()

    def _requests(
        self, inputs: list[list[int]], given: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> list[Request]:
        """A request for each prompt and returned sequence.

        Raises:
            Untranslated: something that the engine cannot do.
        """
        model = self.decoding.model
        config, rest = model._prepare_generation_config(given, **kwargs)
        unknown = [name for name in rest if name not in FROM_GENERATE]
        if unknown:
            raise TypeError(f"generate_batch has no argument {unknown[0]!r}")
        if config.max_new_tokens is None and not any(
            c is not None and c.max_length is not None for c in (given, model.generation_config)
        ):
            config.max_new_tokens = 20 if kwargs.get("max_length") is None else None  # as `generate` does
        mode = config.get_generation_mode()
        if mode not in TOKEN_BY_TOKEN:
            raise Untranslated(GenerationMode(mode).value.replace("_", " "))
        if config.stop_strings is not None:
            raise Untranslated("stop_strings")
        model._prepare_special_tokens(config, device="cpu")
        eos = config._eos_token_tensor
        stops = frozenset[int]() if eos is None else frozenset(int(t) for t in eos.tolist() if t >= 0)
        by_length: dict[int, Any] = {}
        requests = []
        for number, prompt in enumerate(inputs):
            tokens = _tokens(prompt, number)
            length = len(tokens)
            if length not in by_length:
                by_length[length] = self._settings(config, length)
            params, new = by_length[length]
            for _ in range(config.num_return_sequences or 1):
                seed = int(torch.randint(2**63 - 1, ())) if params.do_sample else 0
                requests.append(Request(tokens, replace(params, seed=seed), max_new_tokens=new, stop_tokens=stops))
        return requests

    def _settings(self, config: GenerationConfig, length: int) -> tuple[Any, int]:
        """Sampling and the number of new tokens of a prompt of this length."""
        config = copy.deepcopy(config)
        most = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - length
        new = math.ceil(most)
        if new < 1:
            raise InputError(f"a prompt of {length} tokens with max_length={config.max_length} has no room for another")
        config.max_length = length + new
        if config.min_new_tokens is not None:
            config.min_length = length + config.min_new_tokens
        processors = self.decoding.model._get_logits_processor(config, length, device="cpu")
        return translate(processors, bool(config.do_sample)), new


def _tokens(prompt: Any, number: int) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise InputError(f"inputs[{number}]={prompt!r:.80}: expected a list of token ids") from error


class _Progress:
    """When tokens arrived, and how many requests are done."""

    def __init__(self, requests: list[Request], shown: bool) -> None:
        self.requests, self.shown = requests, shown
        self.created = time.perf_counter()
        self.stamps: list[list[float]] = [[] for _ in requests]

    def __enter__(self) -> _Progress:
        self._bar = _bar(len(self.requests)) if self.shown else contextlib.nullcontext()
        self._shown: Any = self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def take(self, number: int, token: int) -> None:
        """A token of a request arrived."""
        request, stamps = self.requests[number], self.stamps[number]
        stamps.append(time.perf_counter())
        if self._shown is not None and (token in request.stop_tokens or len(stamps) == request.max_new_tokens):
            self._shown.update(1)

    def results(self, outputs: list[list[int]], copies: int, stamped: bool) -> dict[str, GenerationOutput]:
        """By name, in the order of the prompts; sequences beyond a prompt's first are its children."""
        found = {}
        for i, (request, output, stamps) in enumerate(zip(self.requests, outputs, self.stamps, strict=True)):
            name = f"req_{i // copies}" + (f"__child#{i % copies - 1}" if i % copies else "")
            found[name] = GenerationOutput(
                request_id=name,
                prompt_ids=list(request.tokens),
                generated_tokens=output,
                status=RequestStatus.FINISHED,
                created_time=self.created,
                lifespan=(stamps[0], stamps[-1]),
                timestamps=stamps if stamped else None,
            )
        return found


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Any]:
    with logging.tqdm(total=total, desc=f"Solving {total} requests", unit="request") as bar:
        yield bar
