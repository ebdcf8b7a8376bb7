"""`model.generate` over the engine, beneath HuggingFace's own: its signature, preparation, defaults and results.

transformers prepares inputs, processors and criteria as ever, then hands them to the decoding loop here. Three ways
lead on from there:

    fast loop            every processor and criterion is translated: the engine decodes and samples by itself
    loop over pages      beams, scores, custom processors and criteria: HuggingFace's loop, the model computes in pages
    HuggingFace's loop   whatever the engine does not serve, the prompt by the optimized forward; said once, by name
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..errors import RegraftWarning
from ..hooks import on_itself
from .beside import OUTPUTS, Keeps, decoder_arguments, refused_states, states_of
from .paged_cache import PagedCache, Session, close_all, prompts
from .processors import Untranslated, translate
from .requests import Request, of_rows
from .served import TOKEN_BY_TOKEN, Effective, of_its_own, refusal, stops
from .shortcut import MAX_RECIPES, Asked, Recipe, asked, recipe_of, requests_of

if TYPE_CHECKING:
    from ..dispatch import Dispatch


class Serves(Protocol):
    """What is asked of an engine."""

    @property
    def rows(self) -> int:
        """The most sequences that go on in step."""

    @property
    def longest(self) -> int | None:
        """Tokens of a sequence beyond which only HuggingFace's loop goes on; None: what is longer is an error."""

    @property
    def remembered(self) -> int | None:
        """Columns beyond which transformers' own cache forgets keys that the pages would hold; None: it never does."""

    @property
    def counts_padding(self) -> bool:
        """Whether only HuggingFace's loop can say what a prompt behind padding is."""

    @property
    def uncounted(self) -> int | None:
        """The same of a prompt that has tokens of this number beside others."""

    @property
    def encoder(self) -> Keeps | None:
        """What keeps an encoder's states; None where the model has no encoder."""

    def run(
        self,
        requests: list[Request],
        on_token: Callable[[int, int], None] | None = None,
        states: list[Tensor] | None = None,
    ) -> list[list[int]]:
        """The output of each request, without its prompt, in order; `on_token` gets the request's number.

        `states`: of an encoder, what each request sees of them, `[N, E]`.
        """

    def session(self, batch_ids: list[list[int]], max_new_tokens: int, states: list[Tensor] | None = None) -> Session:
        """A batch that goes on in step."""


Make = Callable[[Any, "Serves | str | None"], "Serves | str"]
"""From a model and what was made of it before to the engine of the model as it is now, the same one where it still
fits, or to the reason why there is none."""


@dataclass
class _Call:
    """What is under way in this thread."""

    reason: str | None = None
    """Why the engine cannot serve it, by what is known before it is prepared."""
    way: str = "HuggingFace's loop"
    """What serves it, as it turns out."""
    prompt: Any = None
    """What the caller gives a decoder beside an encoder to begin with."""
    in_step: bool = True
    """Whether it runs in HuggingFace's loop for sure."""
    recipe: Recipe | None = None
    """What calls with equal settings come to."""
    caches: list[weakref.ref[PagedCache]] = field(default_factory=list)
    sessions: list[tuple[weakref.ref[PagedCache], Session]] = field(default_factory=list)
    """Those that caches opened."""

    def close_forgotten(self) -> None:
        """Close the sessions of caches that nobody holds any more: a `generate` may decode more than once."""
        gone = [session for cache, session in self.sessions if cache() is None]
        self.sessions = [(cache, session) for cache, session in self.sessions if cache() is not None]
        close_all(gone)

    def close(self) -> None:
        """Close everything."""
        close_all([cache for held in self.caches if (cache := held()) is not None])
        self.close_forgotten()


class Decoding:
    """What the decoding attributes of one optimized model share: the engine, made when first needed.

    Args:
        make: see `Make`.
    """

    def __init__(self, dispatch: Dispatch, make: Make) -> None:
        self.dispatch, self.make = dispatch, make
        self._begin()

    def _begin(self) -> None:
        self.lock = threading.RLock()
        self.turn = threading.RLock()
        """Held by the call that the engine serves: pages that others keep while they wait would be missing."""
        self.calls = threading.local()
        self._engine: Serves | str | None = None
        self._said: set[str] = set()
        self._recipes: dict[Hashable, Recipe] = {}

    @property
    def model(self) -> Any:
        """The optimized model."""
        return self.dispatch.module

    def engine(self) -> Serves | str:
        """The engine of the model as it is now, or why there is none."""
        with self.lock:
            self._engine = self.make(self.model, self._engine)
            return self._engine

    def recipe(self, call: Asked | None) -> Recipe | None:
        """What a call with these settings came to."""
        return None if call is None else self._recipes.get(call.settings)

    def remember(self, call: Asked | None, recipe: Recipe | None) -> None:
        """Calls with these settings come to this."""
        if call is not None and recipe is not None:
            with self.lock:
                if len(self._recipes) >= MAX_RECIPES:
                    self._recipes.clear()
                self._recipes[call.settings] = recipe

    def say(self, text: str, method: str = "generate") -> None:
        """Warn, once for each text."""
        with self.lock:
            first = text not in self._said
            self._said.add(text)
        if first:
            warnings.warn(f"{type(self.model).__name__}.{method}: {text}", RegraftWarning, stacklevel=4)

    def count(self, way: str) -> None:
        """One more call went this way."""
        with self.lock:
            served = self.dispatch.record.generated
            served[way] = served.get(way, 0) + 1

    def release(self) -> None:
        """Give back all memory."""
        with self.lock:
            self._engine = None

    def __getstate__(self) -> dict[str, Any]:
        return {"dispatch": self.dispatch, "make": self.make}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or loaded model makes an engine of its own."""
        self.__dict__.update(state)
        self._begin()


class PrepareCache:
    """The instance attribute `_prepare_cache_for_generation`: hands out a paged cache where the engine serves."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding

    def __call__(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        decoding = self.decoding
        model, call = decoding.model, getattr(decoding.calls, "call", None)
        original = type(model)._prepare_cache_for_generation
        if call is not None:
            call.close_forgotten()
            engine = self._engine(call, generation_config, generation_mode, model_kwargs, max_cache_length + 1)
            if engine is not None:

                def opened(ids: list[list[int]], padded: int, states: list[Tensor] | None) -> Session:
                    session = engine.session(ids, math.ceil(max_cache_length) + 1 - padded, states)
                    call.sessions.append((held, session))
                    return session

                cache = PagedCache(opened, engine.encoder)
                held = weakref.ref(cache)
                decoding.turn.acquire()
                call.caches.append(held)
                generation_config.use_cache = True  # False: a default of the model's
                call.way = "HuggingFace's loop over pages"
                model_kwargs["past_key_values"] = cache
                return None
        return original(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    def _engine(
        self, call: _Call, config: GenerationConfig, mode: Any, arguments: Mapping[str, Any], length: int
    ) -> Serves | None:
        """The engine, or None after saying why not; `length` is that of the output, padding included."""
        decoding = self.decoding
        if decoding.dispatch.unservable() is not None:  # which its forward says
            return None
        own = decoder_arguments(arguments)
        reason = call.reason or refusal(config, mode, own) or of_its_own(decoding.model, mode)
        engine = decoding.engine() if reason is None else None
        if isinstance(engine, str):
            reason, engine = engine, None
        if engine is not None and engine.encoder is not None:
            reason = refused_states(arguments, engine.encoder)
        if engine is not None and reason is None:
            reason = (
                moved(engine, own, call.prompt)
                or too_long(engine, own, length)
                or (too_many(engine, arguments) if call.in_step else None)
            )
        if reason is not None:
            engine = None
            decoding.say(f"{reason}: served by HuggingFace's loop")
            decoding.dispatch.leave_unsaid("past_key_values with content")  # of which its steps are made
        return engine


class Generate:
    """The instance attribute `generate`."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.__name__ = "generate"
        self.__doc__ = type(decoding.model).generate.__doc__

    @property
    def original(self) -> Callable[..., Any]:
        """The class's own, bound."""
        bound: Callable[..., Any] = type(self.decoding.model).generate.__get__(self.decoding.model)
        return bound

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calls, original = self.decoding.calls, self.original
        outer = getattr(calls, "call", None)
        known = asked(self.decoding.model, args, kwargs) if outer is None else None
        recipe = self.decoding.recipe(known)
        if known is not None and recipe is not None:
            found = self._again(known, recipe)
            if found is not None:
                return found
        calls.call = call = _Call(WITHIN if outer is not None else None, prompt=kwargs.get("decoder_input_ids"))
        try:
            own = outer is None and type(self.decoding.model).generate is GenerationMixin.generate
            loop = self._loop(call, args, kwargs) if own else None
            call.in_step = loop is None
            extra = {} if loop is None else {"custom_generate": loop}
            with self.decoding.dispatch.lenient():
                result = original(*args, **kwargs, **extra)
        finally:
            calls.call = outer
            try:
                call.close()
            finally:
                for _ in call.caches:
                    self.decoding.turn.release()
        self.decoding.count(call.way)
        self.decoding.remember(known, call.recipe)
        if call.caches and getattr(result, "past_key_values", None) is not None:
            return type(result)(**{name: value for name, value in result.items() if name != "past_key_values"})
        return result

    def _again(self, known: Asked, recipe: Recipe) -> Any:
        """The result of a call that is like an earlier one, or None where `generate` must look at it after all."""
        decoding = self.decoding
        if type(decoding.model).generate is not GenerationMixin.generate or decoding.dispatch.unservable() is not None:
            return None
        if on_itself(decoding.model):
            return None
        engine = decoding.engine() if of_its_own(decoding.model, recipe.mode) is None else ""
        if isinstance(engine, str) or engine.encoder is not None:
            return None
        length = known.input_ids.shape[1] + recipe.max_new_tokens
        mask = {"attention_mask": known.mask}
        if (moved(engine, mask) or too_long(engine, mask, length)) is not None:
            return None
        with torch.no_grad():
            requests = requests_of(recipe, known)
            if requests is None:
                return None
            with decoding.turn:
                outputs = engine.run(requests)
            decoding.count(FAST)
            return _result(outputs, known.input_ids, recipe.fill, recipe.as_dict)

    def _loop(self, call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """What decodes in place of HuggingFace's loop, or None where that one must be chosen by `generate` itself."""
        try:
            given = inspect.signature(self.original).bind(*args, **kwargs).arguments
        except TypeError:
            return None  # `generate` itself says what is wrong
        settings = Effective(
            given.get("kwargs", {}), given.get("generation_config"), self.decoding.model.generation_config
        )
        assistant = given.get("assistant_model")
        for name in ("synced_gpus", "assistant_model", "custom_generate"):
            if given.get(name):
                call.reason = name
                return None
        if settings.position_ids is not None:
            call.reason = "position_ids"
        config = given.get("generation_config")
        if False in (given.get("kwargs", {}).get("use_cache"), getattr(config, "use_cache", None)):
            call.reason = "use_cache=False"
        if given.get("kwargs", {}).get("cache_implementation") == "paged":
            return None
        if GenerationConfig.get_generation_mode(settings, assistant) not in TOKEN_BY_TOKEN:  # type: ignore[arg-type]
            return None
        if settings.stop_strings is not None:
            return None  # needs the tokenizer, which `generate` keeps from a loop that is not its own
        streamer = given.get("streamer")

        def loop(self: Any, input_ids: Tensor, **prepared: Any) -> Any:
            return decode(decoding, call, input_ids, streamer, prepared)

        decoding = self.decoding
        return loop


def decode(decoding: Decoding, call: _Call, input_ids: Tensor, streamer: Any, prepared: dict[str, Any]) -> Any:
    """The loop: prepared inputs to results, by the engine where it can do everything that is asked.

    Args:
        prepared: what `generate` hands to `_sample`: `logits_processor`, `stopping_criteria`, `generation_config`, and
            the arguments of the model.
    """
    cache = prepared.get("past_key_values")
    if isinstance(cache, PagedCache):
        config, engine = prepared["generation_config"], decoding.engine()
        assert not isinstance(engine, str), "a paged cache was handed out, so there is an engine"
        try:
            if on_itself(decoding.model):
                raise Untranslated(HOOKED)
            requests = _requests(input_ids, streamer, prepared)
        except Untranslated as reason:
            many = too_many(engine, prepared)
            if many is not None:
                decoding.say(f"{many}: served by HuggingFace's loop")
                call.way = _Call.way
                prepared["past_key_values"] = _cache_of(decoding.model)
            elif reason.args[0] not in QUIET:
                decoding.say(f"{reason} runs outside of the graph, in HuggingFace's loop over pages: right, but slower")
        else:
            call.way = FAST
            call.recipe = _recipe(requests, input_ids, streamer, prepared)
            states = states_of(prepared, engine.encoder) if engine.encoder is not None else None
            return _fast(engine, requests, states, input_ids, streamer, config)
    return type(decoding.model)._sample(decoding.model, input_ids, streamer=streamer, **prepared)


FAST = "the fast loop"
WITHIN = "a call from within another, as of a processor"
HOOKED = "a hook on the model itself"
PADDED = "padding, over which this model counts its positions"
SCORES = "scores or logits of each step"
STREAMED_BATCH = "a streamer for more than one sequence"
QUIET = (SCORES, STREAMED_BATCH)
"""What HuggingFace's loop does over pages without a word."""


def _requests(input_ids: Tensor, streamer: Any, prepared: Mapping[str, Any]) -> list[Request]:
    """A request for each row.

    Raises:
        Untranslated: something that only HuggingFace's loop can do.
    """
    config = prepared["generation_config"]
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        raise Untranslated(SCORES)
    if streamer is not None and input_ids.shape[0] > 1:
        raise Untranslated(STREAMED_BATCH)
    params = translate(prepared["logits_processor"], bool(config.do_sample))
    most, eos = stops(prepared["stopping_criteria"])
    tokens = prompts(input_ids, decoder_arguments(prepared).get("attention_mask"))
    return of_rows(params, tokens, input_ids.tolist(), most - input_ids.shape[1], eos)


def _recipe(requests: list[Request], input_ids: Tensor, streamer: Any, prepared: Mapping[str, Any]) -> Recipe | None:
    """What calls with equal settings come to, where that can be said."""
    if streamer is not None or prepared.get(OUTPUTS) is not None:
        return None
    first, prompt = requests[0], input_ids.shape[1]
    return recipe_of(
        first.params, prompt, prompt + first.max_new_tokens, first.stop_tokens, prepared["generation_config"]
    )


def _cache_of(model: Any) -> Any:
    """What HuggingFace would have prepared."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def _fast(
    engine: Serves,
    requests: list[Request],
    states: list[Tensor] | None,
    input_ids: Tensor,
    streamer: Any,
    config: GenerationConfig,
) -> Any:
    """Run them, and put prompts and outputs together as HuggingFace does: the shorter ones are padded on the right."""

    def stream(_: int, token: int) -> None:
        streamer.put(torch.tensor([token]))

    outputs = engine.run(requests, on_token=None if streamer is None else stream, states=states)
    if streamer is not None:
        streamer.end()
    pad = config._pad_token_tensor
    fill = int(pad) if pad is not None else 0  # without one there is no end before the last step either
    return _result(outputs, input_ids, fill, config.return_dict_in_generate, beside=states is not None)


def _result(outputs: list[list[int]], input_ids: Tensor, fill: int, as_dict: bool, beside: bool = False) -> Any:
    """Prompts and outputs as HuggingFace puts them together; `beside` an encoder."""
    longest = max(map(len, outputs))
    padded = [output + [fill] * (longest - len(output)) for output in outputs]
    sequences: Any = torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], dim=1)
    if not as_dict:
        return sequences
    made = GenerateEncoderDecoderOutput if beside else GenerateDecoderOnlyOutput
    return made(sequences=sequences)


def too_many(engine: Serves, arguments: Mapping[str, Any]) -> str | None:
    """Why these rows cannot go on in step, or None."""
    outputs = arguments.get(OUTPUTS)
    batch = outputs[0] if outputs is not None else arguments.get("attention_mask")
    if not isinstance(batch, Tensor) or batch.shape[0] <= engine.rows:
        return None
    return f"{batch.shape[0]} sequences in step, more than max_batch_size={engine.rows}"


def moved(engine: Serves, arguments: Mapping[str, Any], prompt: Any = None) -> str | None:
    """Why padding keeps a call from the engine, or None."""
    mask = arguments.get("attention_mask")
    if engine.counts_padding and isinstance(mask, Tensor) and not bool(mask.all()):
        return PADDED
    if engine.uncounted is not None and isinstance(prompt, Tensor) and bool((prompt == engine.uncounted).any()):
        return PADDED
    return None


def too_long(engine: Serves, arguments: Mapping[str, Any], length: int) -> str | None:
    """Why no sequence can become as long as that, padding included, though HuggingFace's loop can; or None."""
    if engine.remembered is not None and length > engine.remembered:
        return f"more tokens than the {engine.remembered} that its cache keeps, though its attention sees them"
    mask, longest = arguments.get("attention_mask"), engine.longest
    if longest is None or length <= longest:
        return None
    if isinstance(mask, Tensor):
        length -= mask.shape[1] - int(mask.long().sum(-1).max())
    return f"more tokens than the {longest} that the model is made for" if length > longest else None
