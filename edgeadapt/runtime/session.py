"""A bundle, ready to run: adapters swapped in place, tensors in, tensors out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.bundle import Bundle, open_bundle
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import FileError, SessionError
from edgeadapt.runtime import generate as generation
from edgeadapt.runtime.batch import Batch
from edgeadapt.runtime.cache import AdapterKey, Cache, GrowingCache, SharedCache
from edgeadapt.runtime.checks import is_whole
from edgeadapt.runtime.groups import run_groups
from edgeadapt.runtime.inputs import checked_inputs
from edgeadapt.runtime.ort import Binding, OrtGraph, Tensor, TensorInfo, check_provider, open_graph
from edgeadapt.runtime.prefixes import ContentKey, PrefixCache
from edgeadapt.runtime.prepacked import prepacked_graph, shares_weights
from edgeadapt.runtime.promotion import Graphs, Promoter, Promotion
from edgeadapt.runtime.residents import Residents, adapter_key
from edgeadapt.runtime.rows import run_decoder
from edgeadapt.runtime.spec import decoder_spec
from edgeadapt.runtime.step import Wanted, run_step
from edgeadapt.slots import GraphRecord

if TYPE_CHECKING:
    from edgeadapt.runtime.prompts import Prompt
    from edgeadapt.runtime.sampling import Options
    from edgeadapt.runtime.tokenizer import TextCoder
    from edgeadapt.runtime.writer import Generation

Array = NDArray[Any]


def open_session(
    bundle: Bundle | Path | str,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    keep_graphs: bool = True,
    share_weights: bool | None = None,
    prefix_cache_bytes: int = 0,
    promote_after: int | None = None,
    promoted_max_bytes: int | None = None,
) -> Session:
    """Return a session over a bundle. Graphs are opened when they are first needed.

    Args:
        bundle: a bundle's folder, or what `open_bundle` returned.
        threads: threads inside an operator, None for ONNX Runtime's own choice.
        provider: "cpu" or "cuda"; "cuda" is an error where it cannot be used, never a silent run on the CPU.
        keep_graphs: keep the plain graph open while an adapter is active, and the slots graph while none is: a swap
            is then instant, at the price of the weights' memory twice. False opens one form at a time.
        share_weights: have all sessions on this device, of this process and others, use the same memory for weights.
            It takes a file of 2.3 times the weights' size in the user's cache (see `prepacked.py`), which is written
            when a graph is first opened. None asks the environment variable EDGEADAPT_SHARE_WEIGHTS (1 or 0), else
            False. Where the cache cannot be written, a warning says so and the session opens weights of its own.
        prefix_cache_bytes: keep keys and values of up to so many bytes of texts that were read or written, so that a
            prompt which begins like one of them, with the same adapter, is read from there on only. 0 keeps none: then
            equal calls do equal work, and memory is what it was after loading.
        promote_after: promote an adapter in the background (see `Session.promote`) once it has read and written so many
            tokens (samples, where the model reads none); None leaves it to `promote`.
        promoted_max_bytes: how much the weights files of promoted adapters may take in memory, None for two of them;
            what was not used for longest makes room.

    Raises:
        BundleError: if the folder is no bundle.
        SessionError: if an argument is wrong or the provider cannot be used here.
    """
    check_provider(provider)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    shared = shares_weights(share_weights, provider)
    prefixes = PrefixCache(prefix_cache_bytes)
    return Session(
        opened,
        threads=threads,
        provider=provider,
        keep_graphs=keep_graphs,
        share_weights=shared,
        prefixes=prefixes if prefixes.max_bytes else None,
        promote_after=promote_after,
        promoted_max_bytes=promoted_max_bytes,
    )


class Session:
    """One base with its adapters, of which one, a blend, or none is active. Not for several threads at once.

    Make it with `open_session`; it is a context manager.
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
        self.keep_graphs = keep_graphs
        self.share_weights = share_weights
        self.prefixes = prefixes
        self.spec: DecoderSpec | None = decoder_spec(bundle.manifest)
        self._residents = Residents(bundle, mapped=share_weights)
        self._graphs: dict[str, OrtGraph] = {}
        self._bindings: dict[str, Binding] = {}
        self._promoter = Promoter(
            bundle,
            partial(open_graph, threads=threads, provider=provider),
            max_bytes=promoted_max_bytes,
            after_tokens=promote_after,
        )
        self._promoted: Graphs | None = None
        self._key: AdapterKey = ()
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
        self._promoter.close()
        self._promoted = None
        self._bindings.clear()
        self._graphs.clear()
        self._residents = Residents(self.bundle)
        self._closed = True

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that `use` takes."""
        return tuple(sorted({*self.bundle.adapter_names, *self._residents.lent}))

    @property
    def adapter(self) -> str | dict[str, float] | None:
        """The active adapter's name, a blend's weights by name, or None for the bare base."""
        return self.adapter_of(self._key)

    def adapter_of(self, key: AdapterKey) -> str | dict[str, float] | None:
        """Return what `adapter` is while `key` is active."""
        if self.bundle.manifest.merged is not None:
            return self.bundle.manifest.merged
        if len(key) == 1 and key[0][1] == 1.0:
            return key[0][0]
        return dict(key) or None

    def key_of(self, adapter: str | Mapping[str, float] | EllipsisType | None) -> AdapterKey:
        """Return a choice of adapters in the form that caches compare; ... stands for what is active.

        Raises:
            SessionError: for an unknown name, weights that are not numbers, or a merged bundle.
        """
        if adapter is ...:
            return self._key
        merged = self.bundle.manifest.merged
        if merged is None:
            return adapter_key(adapter, self.adapters)
        if adapter not in (None, merged):
            raise SessionError(
                f"adapter {adapter!r} cannot be used: {merged!r} is merged into the weights of this bundle",
                hint="export without --merge to swap adapters",
            )
        return ()

    def use(self, adapter: str | Mapping[str, float] | None) -> None:
        """Make an adapter, a blend of adapters ({"a": 0.7, "b": 0.3}), or none (the bare base) active.

        The session stays open: tensors are read from the bundle once, and bound once per call. If it fails, what was
        active before stays active.

        Raises:
            SessionError: for an unknown name, weights that are not numbers, or a merged bundle.
            BundleError: if the adapter's file is damaged.
        """
        self._check_open()
        key = self.key_of(adapter)
        if self._promoter.graphs(key) is None:
            self._use_slots(key)
        self._key = key
        self._follow_promotion()

    def _use_slots(self, key: AdapterKey) -> None:
        """Bind an adapter beside the base, or the bare base."""
        tensors = self.adapter_tensors(key)
        if not (key and self._key and self._rebase(tensors)):
            self._bindings = self._bind(tensors, slots=bool(key), keep_graphs=self.keep_graphs)
        self._promoted = None

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
        self._promoter.start(adapter, keep=self._key)
        if wait:
            self._promoter.wait(adapter)
        return self.promotion(adapter)

    def promotion(self, adapter: str) -> Promotion:
        """Return how far the promotion of an adapter is."""
        return self._promoter.status(adapter)

    def demote(self, adapter: str) -> None:
        """Cancel an adapter's promotion, or close its weights; the adapter goes on beside the base.

        Raises:
            BundleError: if its file is damaged.
        """
        self._check_open()
        if self._promoted is not None and self.adapter == adapter:
            self._use_slots(self._key)
        self._promoter.stop(adapter)

    @property
    def form(self) -> Literal["plain", "slots", "promoted"]:
        """What runs: the bare (or merged) base, an adapter beside it, or weights that have an adapter in them."""
        if self._promoted is not None:
            return "promoted"
        return "slots" if self._key else "plain"

    def _follow_promotion(self) -> None:
        """Switch to promoted weights of what is active, if there are new ones."""
        graphs = self._promoter.graphs(self._key)
        if graphs is None or graphs is self._promoted:
            return
        self._bindings = {role: Binding(graph, {}) for role, graph in graphs.items()}
        self._promoted = graphs
        if not self.keep_graphs:
            self._graphs = {}

    def lend(self, name: str, tensors: Mapping[str, Array]) -> None:
        """Let this session use an adapter that is not in its bundle: to measure it before it is written.

        Args:
            name: what `use` will know it by.
            tensors: float32 by graph input name, as `bundle.bind` gives them.

        Raises:
            BundleError: if a tensor is none that an adapter of this bundle may set.
        """
        self._residents.lend(name, tensors)

    def prepare(self) -> None:
        """Open the graphs that the active adapter needs now instead of at the first run."""
        self._check_open()
        if not self._bindings:
            self._bindings = self._bind({}, slots=False, keep_graphs=self.keep_graphs)

    def evict(self, adapter: str) -> None:
        """Forget an adapter's tensors, so that the next `use` reads them from the bundle again.

        Raises:
            SessionError: if it is active.
        """
        if any(name == adapter for name, _ in self._key):
            raise SessionError(f"adapter {adapter!r} is active", hint="session.use(None) first")
        self._residents.evict(adapter)

    def inputs(self, role: str | None = None) -> dict[str, TensorInfo]:
        """Return the data inputs of a graph by name (`role` None: the only graph, or the decoder)."""
        graph = self._binding(role or self._main_role()).graph
        return dict(graph.inputs)

    def outputs(self, role: str | None = None) -> dict[str, TensorInfo]:
        """Return the outputs of a graph by name (`role` None: the only graph, or the decoder)."""
        return dict(self._binding(role or self._main_role()).graph.outputs)

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
        the encoder's inputs and `decoder_input_ids` and gives `logits`.

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
        return self._run_graph("model", inputs)

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Return an empty key-value cache for `batch_size` sequences of up to `max_length` tokens.

        Raises:
            SessionError: if this is no decoder-only model, or a size is out of range.
        """
        spec = self.require_decoder()
        if self.has_encoder:
            raise SessionError(
                "this model has an encoder; its cache starts with what the encoder says",
                hint="use session.encode(inputs)",
            )
        _check_sizes(spec, batch_size, max_length)
        if spec.shared_cache:
            return SharedCache(spec, batch_size, max_length, "cuda" if self.provider == "cuda" else "cpu")
        return GrowingCache(spec, batch_size, max_length)

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
        cache.adapter = self._key
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
        if cache.adapter is not None and cache.adapter != self._key:
            raise SessionError(
                f"the cache was filled with adapter {_say(cache.adapter)}, active is {_say(self._key)}: "
                "keys and values of one adapter mean nothing to another",
                hint="make a new cache with session.new_cache after session.use, and feed the tokens again",
            )
        result = run_step(self._binding("decoder"), spec, input_ids, cache, lengths=lengths, logits=logits)
        cache.adapter = self._key
        self._promoter.count(self._key, int(np.size(input_ids) if lengths is None else np.sum(lengths)))
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

    def content_of(self, key: AdapterKey) -> ContentKey:
        """Return what `key` binds, as digests with weights: the same for the same tensors under any name.

        Promoted weights are rounded anew, so what they compute is a content of its own.
        """
        digests = tuple(sorted((self._residents.digest(name), weight) for name, weight in key))
        return (*digests, ("promoted", 1.0)) if self.is_promoted(key) else digests

    def is_promoted(self, key: AdapterKey) -> bool:
        """Return whether `binding` gives promoted weights for `key`."""
        return key == self._key and self._promoted is not None

    def count_tokens(self, key: AdapterKey, tokens: int) -> None:
        """Take in that an adapter has run `tokens` tokens; enough of them promote it, where that was asked for."""
        self._promoter.count(key, tokens)

    def is_active(self, key: AdapterKey) -> bool:
        """Return whether `use` chose what `key` stands for."""
        return key == self._key

    def binding(self, key: AdapterKey) -> Binding:
        """Return the decoder's graph with the tensors of `key` bound: that of `step` if it is active, else a new one.

        The bare base runs in the slots graph where only that is open.
        """
        self._check_open()
        if key == self._key:
            return self._binding("decoder")
        record = self.bundle.manifest.graphs["decoder"]
        slots = bool(key) or (record.plain not in self._graphs and record.slots in self._graphs)
        return self._bind(self.adapter_tensors(key), slots=slots)["decoder"]

    def slots_binding(self) -> Binding:
        """Return the decoder's slots graph with no adapter bound."""
        self._check_open()
        return self._bind({}, slots=True)["decoder"]

    def adapter_tensors(self, key: AdapterKey) -> Mapping[str, Tensor]:
        """Return what `key` binds, float32 by graph input name."""
        return self._residents.tensors(key) if key else {}

    def _run_graph(self, role: str, inputs: Mapping[str, Any]) -> dict[str, Array]:
        binding = self._binding(role)
        for name, array in checked_inputs(inputs, binding.graph.inputs).items():
            binding.set_input(name, Tensor(array))
        for name in binding.graph.outputs:
            binding.allocate_output(name)
        found = binding.run()
        self._promoter.count(self._key, max(np.size(inputs.get("input_ids", ())), len(next(iter(inputs.values())))))
        return found

    def _binding(self, role: str) -> Binding:
        self.prepare()
        self._follow_promotion()
        return self._bindings[role]

    def _rebase(self, tensors: Mapping[str, Tensor]) -> bool:
        """Swap one adapter for another in the bindings; False, and nothing done, where that needs new ones."""
        roles = list(self._bindings.values())
        if len(roles) != 1 or not tensors.keys() <= roles[0].graph.optional.keys() or not roles[0].can_rebase(tensors):
            return False
        roles[0].rebase(tensors)
        return True

    def _bind(self, tensors: Mapping[str, Tensor], *, slots: bool, keep_graphs: bool = True) -> dict[str, Binding]:
        """Return a binding per graph with an adapter's tensors bound where the graph takes them."""
        if not keep_graphs:
            wanted = {(record.slots if slots else None) or record.plain for record in self._records()}
            if not wanted.issuperset(self._graphs):
                self._bindings = {}
                self._graphs = {name: graph for name, graph in self._graphs.items() if name in wanted}
        bindings = {}
        for role, record in self.bundle.manifest.graphs.items():
            name = record.slots if slots and record.slots is not None else record.plain
            if name not in self._graphs:
                self._graphs[name] = self._open_graph(name)
            graph = self._graphs[name]
            bindings[role] = Binding(graph, {key: value for key, value in tensors.items() if key in graph.optional})
        taken = {name for binding in bindings.values() for name in binding.graph.optional}
        unused = [name for name in tensors if name not in taken]
        if unused:
            raise SessionError(
                f"no graph of this bundle takes the adapter's tensor {unused[0]!r}",
                hint="check the bundle with `edgeadapt verify`",
            )
        return bindings

    def _open_graph(self, name: str) -> OrtGraph:
        if self.share_weights:
            try:
                path = prepacked_graph(self.bundle, name)
                return open_graph(path, threads=self.threads, provider=self.provider)
            except (FileError, SessionError) as error:
                warnings.warn(f"weights are not shared: {error.message}; {error.hint}", stacklevel=2)
                self.share_weights = False
        return open_graph(self.bundle.file(name), threads=self.threads, provider=self.provider)

    def _records(self) -> Sequence[GraphRecord]:
        return tuple(self.bundle.manifest.graphs.values())

    def _main_role(self) -> str:
        return "model" if "model" in self.bundle.manifest.graphs else "decoder"

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
