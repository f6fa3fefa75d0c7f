"""A bundle, ready to run: adapters swapped in place, tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.bundle import Bundle
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import SessionError
from edgeadapt.runtime import generate as generation
from edgeadapt.runtime.active import Active
from edgeadapt.runtime.batch import Batch
from edgeadapt.runtime.cache import AdapterKey, Cache, GrowingCache, SharedCache
from edgeadapt.runtime.checks import is_whole
from edgeadapt.runtime.groups import run_groups
from edgeadapt.runtime.inputs import checked_inputs, inputs_by_role
from edgeadapt.runtime.ort import Binding, Tensor, TensorInfo
from edgeadapt.runtime.prefixes import PrefixCache
from edgeadapt.runtime.promotion import Promotion
from edgeadapt.runtime.rows import run_decoder
from edgeadapt.runtime.spec import decoder_spec
from edgeadapt.runtime.step import Wanted, run_step

if TYPE_CHECKING:
    from edgeadapt.runtime.prompts import Prompt
    from edgeadapt.runtime.sampling import Options
    from edgeadapt.runtime.tokenizer import TextCoder
    from edgeadapt.runtime.writer import Generation

Array = NDArray[Any]


class Session:
    """One base with its adapters, of which one, a blend, or none is active. Not for several threads at once.

    Make it with `open_session`; it is a context manager. `threads` says what operators run with, None for the default.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None,
        provider: str,
        keep_graphs: bool = True,
        share_weights: bool = False,
        prefixes: PrefixCache | None = None,
        promote_after: int | None = None,
        promoted_max_bytes: int | None = None,
    ) -> None:
        self.bundle = bundle
        self.threads = threads
        self.provider = provider
        self.prefixes = prefixes
        self.spec: DecoderSpec | None = decoder_spec(bundle.manifest)
        self.active = Active(
            bundle,
            threads=threads,
            provider=provider,
            keep_graphs=keep_graphs,
            share_weights=share_weights,
            promote_after=promote_after,
            promoted_max_bytes=promoted_max_bytes,
        )
        self._text: TextCoder | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the graphs and the adapters; the session cannot be used after that."""
        self.active.close()
        self._closed = True

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `use` takes."""
        return self.active.names

    @property
    def adapter(self) -> str | dict[str, float] | None:
        """The active adapter's name, a blend's weights by name, or None for the bare base."""
        return self.active.adapter_of(self.active.key)

    def use(self, adapter: str | Mapping[str, float] | None) -> None:
        """Make an adapter, a blend of adapters ({"a": 0.7, "b": 0.3}), or none (the bare base) active.

        The session stays open: tensors are read from the bundle once, and bound once per call. If it fails, what was
        active before stays active.

        Raises:
            SessionError: for an unknown name, weights that are not numbers, or a merged bundle.
            BundleError: if the adapter's file is damaged.
        """
        self._check_open()
        self.active.use(self.active.key_of(adapter))

    def promote(self, adapter: str, *, wait: bool = False) -> Promotion:
        """Prepare weights that have an adapter in them, in the background, and use them from the next step on.

        Meanwhile the adapter serves beside the base as before. It needs the adapter's patch, which an export with
        `--patches` makes, and writes the weights into the device's cache (see `device_cache.py`), where they are found
        at once the next time. What is under way keeps its key-value cache: both forms are one model but for rounding.

        Args:
            adapter: its name in the bundle; it need not be active.
            wait: return when it is ready, and raise what went wrong.

        Raises:
            BundleError: if there is no such adapter, or it has no patch.
            SessionError: for a blend, or if its weights take more memory than `promoted_max_bytes`.
        """
        self._check_open()
        if not isinstance(adapter, str):
            raise SessionError(
                f"{adapter!r} cannot be promoted: only one whole adapter can", hint="use the blend as it is"
            )
        self.active.promoter.start(adapter, keep=self.active.key)
        if wait:
            self.active.promoter.wait(adapter)
        return self.promotion(adapter)

    def promotion(self, adapter: str) -> Promotion:
        """Return how far the promotion of an adapter is."""
        return self.active.promoter.status(adapter)

    def demote(self, adapter: str) -> None:
        """Cancel an adapter's promotion, or close its weights; the adapter goes on beside the base.

        Raises:
            BundleError: if its file is damaged.
        """
        self._check_open()
        self.active.demote(adapter)

    @property
    def form(self) -> Literal["plain", "slots", "promoted"]:
        """What runs: the bare (or merged) base, an adapter beside it, or weights that have an adapter in them."""
        return self.active.form

    def lend(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Let this session use an adapter that is not in its bundle: to measure it before it is written.

        Args:
            name: what `use` will know it by.
            tensors: float32 by graph input name, as `bundle.bind` gives them.

        Raises:
            BundleError: if a tensor is none that an adapter of this bundle may set.
        """
        self.active.lend(name, tensors)

    def prepare(self) -> None:
        """Open the graphs that the active adapter needs now instead of at the first run."""
        self._check_open()
        self.active.prepare()

    def evict(self, adapter: str) -> None:
        """Forget an adapter's tensors, so that the next `use` reads them from the bundle again.

        Raises:
            SessionError: if it is active.
        """
        if any(name == adapter for name, _ in self.active.key):
            raise SessionError(f"adapter {adapter!r} is active", hint="session.use(None) first")
        self.active.evict(adapter)

    def inputs(self, role: str | None = None) -> dict[str, TensorInfo]:
        """Return the data inputs of a graph by name (`role` None: the only graph, the decoder, or both towers)."""
        roles = self._main_roles() if role is None else (role,)
        return {name: info for each in roles for name, info in self._binding(each).graph.inputs.items()}

    def outputs(self, role: str | None = None) -> dict[str, TensorInfo]:
        """Return the outputs of a graph by name (`role` None: the only graph, the decoder, or both towers)."""
        roles = self._main_roles() if role is None else (role,)
        return {name: info for each in roles for name, info in self._answers(self._binding(each)).items()}

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        chunk_size: int | None = None,
        adapters: Sequence[str | Mapping[str, float] | None] | None = None,
    ) -> dict[str, Array]:
        """Return the model's outputs for whole sequences, pictures or features.

        A single-pass model takes its graph's inputs and gives all its outputs. A decoder takes `input_ids`
        int64[batch, seq] and an optional `attention_mask` whose ones are contiguous in each row and padding left or
        right; it gives `logits` float32[batch, seq, vocab], zero where the mask is. A sequence-to-sequence model takes
        the encoder's inputs and `decoder_input_ids` and gives `logits`. Of a model of two towers each tower runs whose
        inputs are given.

        Args:
            inputs: arrays by name; whole numbers become int64 and floats float32 where the graph wants those.
            chunk_size: only for decoders: read the sequence in chunks of so many tokens.
            adapters: an adapter, blend or None for each row; None for the active adapter in all rows. Rows of one
                adapter run together, one adapter after the other.

        Raises:
            SessionError: naming what is expected, for an unknown or missing input, a wrong dtype, rank or length.
        """
        self._check_open()
        if adapters is not None:
            return run_groups(self, inputs, adapters, chunk_size)
        if self.spec is not None and not self.has_encoder:
            return run_decoder(self, self.spec, inputs, chunk_size)
        if chunk_size is not None:
            raise SessionError("chunk_size is for decoder-only models", hint="leave it out")
        if self.spec is not None:
            given = dict(inputs)
            if "decoder_input_ids" not in given:
                raise SessionError(
                    "input 'decoder_input_ids' is missing",
                    hint="give it, or use session.generate to let the model write",
                )
            ids = given.pop("decoder_input_ids")
            return {"logits": self.step(ids, self.encode(given))}
        found: dict[str, Array] = {}
        for role, given in inputs_by_role(inputs, self.bundle.manifest.graphs).items():
            found |= self._run_graph(role, given)
        return found

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Return an empty key-value cache for `batch_size` sequences of up to `max_length` tokens.

        Virtual tokens of an adapter have room of their own, as long as the model has positions for all.

        Raises:
            SessionError: if this is no decoder-only model, or a size is out of range.
        """
        spec = self._spec_for_cache(batch_size, max_length)
        if not spec.shared_cache:
            return GrowingCache(spec, batch_size, max_length)
        if max_length > (room := self.room_beside(self.active.key)):
            raise SessionError(
                f"max_length is {max_length}, and with the virtual tokens of adapter {_say(self.active.key)} this "
                f"model holds {room}",
                hint=f"give a whole number from 1 to {room}",
            )
        return self.shared_cache(batch_size, max_length)

    def shared_cache(self, batch_size: int, max_length: int) -> SharedCache:
        """Return an empty cache whose rows may have adapters of their own (used by `Batch`).

        Raises:
            SessionError: if this is no decoder-only model with such a cache, or a size is out of range.
        """
        spec = self._spec_for_cache(batch_size, max_length)
        if not spec.shared_cache:
            raise SessionError(
                "this decoder's cache grows by concatenation, so rows cannot join and leave",
                hint="export the model again",
            )
        device = "cuda" if self.provider == "cuda" else "cpu"
        room = self.active.residents.longest_prefix
        return SharedCache(spec, batch_size, max_length, device, prefix_room=room)

    def _spec_for_cache(self, batch_size: int, max_length: int) -> DecoderSpec:
        spec = self.require_decoder()
        if self.has_encoder:
            raise SessionError(
                "this model has an encoder; its cache starts with what the encoder says",
                hint="use session.encode(inputs)",
            )
        _check_sizes(spec, batch_size, max_length)
        return spec

    @property
    def prefix_tokens(self) -> int:
        """How many virtual tokens the active adapter's texts begin with."""
        prefix = self.active.prefix(self.active.key)
        return 0 if prefix is None else prefix.tokens

    def room_beside(self, key: AdapterKey) -> int:
        """Return how many tokens of the user the model holds while `key` is active: all but its virtual tokens."""
        prefix = self.active.prefix(key)
        return self.require_decoder().max_length - (0 if prefix is None else prefix.tokens)

    def encode(self, inputs: Mapping[str, Any], *, max_length: int | None = None) -> Cache:
        """Run a sequence-to-sequence model's encoder and return a cache for its decoder.

        Args:
            inputs: the encoder's inputs by name (`input_ids` and `attention_mask`, or `input_features`).
            max_length: how many tokens the decoder may hold, None for as many as it can.

        Raises:
            SessionError: if the model has no encoder, or an input is unknown, missing or of the wrong shape.
        """
        spec = self.require_decoder()
        if not self.has_encoder:
            raise SessionError("this model has no encoder", hint="use session.new_cache(batch_size, max_length)")
        found = self._run_graph("encoder", inputs)
        batch_size = len(next(iter(found.values())))
        limit = spec.max_length if max_length is None else max_length
        _check_sizes(spec, batch_size, limit)
        wants_mask = "encoder_attention_mask" in self._binding("decoder").graph.inputs
        mask = Tensor(np.asarray(inputs["attention_mask"], np.int64)) if wants_mask else None
        cache = GrowingCache(
            spec,
            batch_size,
            limit,
            cross={name: Tensor(found[name]) for name in spec.cross_names},
            encoder_mask=mask,
        )
        cache.adapter = self.active.key
        return cache

    def step(self, input_ids: Any, cache: Cache, *, lengths: Any = None, logits: Wanted = "all") -> Array:
        """Feed tokens to a decoder and advance `cache`.

        Args:
            input_ids: int64[batch, seq], right padded where rows differ in length.
            cache: from `new_cache` or `encode`; it is advanced by each row's number of valid tokens.
            lengths: int64[batch], how many tokens of each row are valid; None for all.
            logits: "all" positions, the "last" valid position of each row, or "none".

        Returns:
            float32[batch, kept, vocab]: kept is seq, 1 or 0. For "all", positions past a row's length are zero.

        Raises:
            SessionError: if the tokens do not fit the vocabulary, the batch or the cache, or if another adapter filled
                the cache.
        """
        self._check_open()
        spec = self.require_decoder()
        if cache.adapter is not None and cache.adapter != self.active.key:
            raise SessionError(
                f"the cache was filled with adapter {_say(cache.adapter)}, active is {_say(self.active.key)}: "
                "keys and values of one adapter mean nothing to another",
                hint="make a new cache with session.new_cache after session.use, and feed the tokens again",
            )
        if cache.adapter is None and isinstance(cache, SharedCache):
            prefix = self.active.prefix(self.active.key)
            for row in range(cache.batch_size):
                cache.begin(row, prefix)
        result = run_step(self._binding("decoder"), spec, input_ids, cache, lengths=lengths, logits=logits)
        cache.adapter = self.active.key
        self.active.promoter.count(self.active.key, int(np.size(input_ids) if lengths is None else np.sum(lengths)))
        return result

    @property
    def text(self) -> TextCoder:
        """The bundle's tokenizer and chat template.

        Raises:
            SessionError: if the bundle holds no tokenizer.
        """
        if self._text is None:
            from edgeadapt.runtime.tokenizer import open_text_coder

            self._text = open_text_coder(self.bundle)
        return self._text

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[str]:
        """Return an iterator over the pieces of text that the model writes after `prompt`.

        Args:
            prompt: a text (wrapped as a user's message if the bundle has a chat template), token ids, chat messages
                ({"role": ..., "content": ...}), or for a sequence-to-sequence model the encoder's inputs by name.
            **options: see `Options`.

        Raises:
            SessionError: at once, for a wrong prompt or option.
        """
        self._check_open()
        return generation.stream(self, prompt, options)

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Return all that the model writes after `prompt`; arguments as for `generate`.

        Raises:
            SessionError: for a wrong prompt or option.
        """
        return self.generate_batch([prompt], **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        adapters: Sequence[str | Mapping[str, float] | None] | None = None,
        **options: Unpack[Options],
    ) -> list[Generation]:
        """Return what the model writes after each prompt, run as one batch; rows may differ in length.

        Row i draws with `seed` + i, so it equals `complete(prompts[i], seed=seed + i)`.

        Args:
            prompts: as for `generate`.
            adapters: an adapter, blend or None for each prompt; None for the active adapter in all rows.
            **options: see `Options`.

        Raises:
            SessionError: for a wrong prompt, adapter or option.
        """
        self._check_open()
        return generation.batch(self, prompts, adapters, options)

    def batch(self, rows: int = 16, max_length: int = 2048) -> Batch:
        """Return an empty batch, which requests with adapters of their own join and leave between steps.

        Args:
            rows: how many texts are written at once at most; more requests wait.
            max_length: the longest text with its prompt, in tokens. Memory is taken as rows are filled.

        Raises:
            SessionError: if this is no decoder-only model, or a size is out of range.
        """
        self._check_open()
        return Batch(self, rows, min(max_length, self.require_decoder().max_length))

    def _run_graph(self, role: str, inputs: Mapping[str, Any]) -> dict[str, Array]:
        binding = self._binding(role)
        for name, array in checked_inputs(inputs, binding.graph.inputs).items():
            binding.set_input(name, Tensor(array))
        for name in self._answers(binding):
            binding.allocate_output(name)
        found = binding.run()
        self.active.promoter.count(
            self.active.key, max(np.size(inputs.get("input_ids", ())), len(next(iter(inputs.values()))))
        )
        return found

    def _answers(self, binding: Binding) -> dict[str, TensorInfo]:
        """Return a graph's outputs but those that adapters' branches give beside the model's answers."""
        beside = {name for slot in self.bundle.manifest.branches for name in slot.outputs.values()}
        return {name: info for name, info in binding.graph.outputs.items() if name not in beside}

    def _binding(self, role: str) -> Binding:
        self._check_open()
        return self.active.binding(role)

    def _main_roles(self) -> tuple[str, ...]:
        """Return the only graph, the decoder, or both towers."""
        graphs = self.bundle.manifest.graphs
        return ("decoder",) if "decoder" in graphs else tuple(graphs)

    @property
    def has_encoder(self) -> bool:
        """Whether this is a sequence-to-sequence model."""
        return "encoder" in self.bundle.manifest.graphs

    def require_decoder(self) -> DecoderSpec:
        """Return the decoder's record.

        Raises:
            SessionError: if this model does not write text.
        """
        if self.spec is None:
            raise SessionError(
                f"this bundle's task is {self.bundle.manifest.task!r}; it does not write text",
                hint="use session.run(inputs)",
            )
        return self.spec

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed", hint="open a new one with open_session")


def _check_sizes(spec: DecoderSpec, batch_size: int, max_length: int) -> None:
    if not is_whole(batch_size, 1):
        raise SessionError(f"batch_size is {batch_size!r}", hint="give a whole number of 1 or more")
    if not is_whole(max_length, 1, spec.max_length):
        raise SessionError(f"max_length is {max_length!r}", hint=f"give a whole number from 1 to {spec.max_length}")


def _say(key: AdapterKey) -> str:
    if not key:
        return "none"
    if len(key) == 1 and key[0][1] == 1.0:
        return repr(key[0][0])
    return "+".join(f"{weight:g}*{name}" for name, weight in key)
