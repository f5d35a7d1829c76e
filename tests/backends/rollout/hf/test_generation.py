"""Tests of the decode loop around both decoders."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Literal, Protocol

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from lightrft.backends.rollout.hf.generation import GeneratedSequence, build_token_generator
from lightrft.errors import ConfigError, DataError, EngineStateError, UnsupportedError
from lightrft.strategy.protocols import SamplingParams

Path = Literal["fused", "transformers"]
PATHS: tuple[Path, ...] = ("fused", "transformers")
RAGGED = [[5, 3, 9], [1], [7, 7, 2, 4, 11, 30], [8, 1, 4], [9, 9, 9, 9]]


class BuildTinyModel(Protocol):
    def __call__(self, model_type: str, **overrides: object) -> PreTrainedModel: ...


def _tokens(made: Sequence[GeneratedSequence]) -> list[tuple[int, ...]]:
    return [sequence.token_ids for sequence in made]


def _transformers_greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[tuple[int, ...]]:
    """What `model.generate` makes of each prompt alone."""
    made: list[tuple[int, ...]] = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=params.min_new_tokens or None,
            eos_token_id=list(params.stop_token_ids) or None,
        )
        made.append(tuple(output[0, len(prompt) :].tolist()))
    return made


def _policy_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], made: GeneratedSequence, temperature: float
) -> list[float]:
    """log_softmax(logits / temperature) of the made tokens, by one forward over the whole sequence in float64."""
    token_ids = torch.tensor([[*prompt, *made.token_ids]])
    with torch.no_grad():
        logits_TV = model(input_ids=token_ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    logprobs_TV = (logits_TV / (temperature or 1.0)).log_softmax(-1)
    return logprobs_TV.gather(1, torch.tensor(made.token_ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("stops", "min_new_tokens"), [((), 0), ((4, 17, 30, 52), 0), ((4, 17, 30, 52), 6)])
def test_greedy_equals_transformers_generate(
    tiny_model: BuildTinyModel, path: Path, model_type: str, stops: tuple[int, ...], min_new_tokens: int
) -> None:
    """Greedy tokens of ragged prompts in one batch are those of `model.generate`, with stop tokens and a minimum."""
    model = tiny_model(model_type, tie_word_embeddings=model_type == "qwen2")
    params = SamplingParams(temperature=0.0, max_new_tokens=12, min_new_tokens=min_new_tokens, stop_token_ids=stops)
    made = build_token_generator(model, path=path).generate(RAGGED, params)
    assert _tokens(made) == _transformers_greedy(model, RAGGED, params)


# Derandomized: the decoders differ by rounding, and one draw in 10**5 or so lies that near to a border between tokens.
@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    prompts=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=9), max_size=5),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    stops=st.lists(st.integers(0, 60), max_size=12),
    max_new_tokens=st.integers(1, 9),
    min_share=st.floats(0, 1),
    n=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    max_batch_size=st.integers(1, 16),
)
def test_laws_of_generation(
    tiny_model: BuildTinyModel,
    prompts: list[list[int]],
    temperature: float,
    top_k: int,
    top_p: float,
    stops: list[int],
    max_new_tokens: int,
    min_share: float,
    n: int,
    seed: int,
    max_batch_size: int,
) -> None:
    """Decoders agree; order, lengths, stops and finish reasons are as asked; logprobs equal a plain forward's."""
    model = tiny_model("qwen3", head_dim=8)
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token_ids=tuple(stops),
        max_new_tokens=max_new_tokens,
        min_new_tokens=int(min_share * max_new_tokens),
        n=n,
        seed=seed,
    )
    made = build_token_generator(model, max_batch_size=max_batch_size, path="fused").generate(prompts, params)
    other = build_token_generator(model, path="transformers").generate(prompts, params)
    assert _tokens(made) == _tokens(other)
    assert [(one.prompt_index, one.sample_index) for one in made] == [
        (prompt, sample) for prompt in range(len(prompts)) for sample in range(n)
    ]
    for one in made:
        *body, last = one.token_ids
        assert not set(body) & set(stops)
        assert not set(one.token_ids[: params.min_new_tokens]) & set(stops)
        if one.finish_reason == "stop":
            assert last in stops
        else:
            assert len(one.token_ids) == max_new_tokens
            assert last not in stops
        expected = _policy_logprobs(model, prompts[one.prompt_index], one, temperature)
        assert one.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 7, "stop_token_ids": (1, 2, 3, 4, 5, 6)}])
def test_tokens_do_not_depend_on_the_batch(tiny_model: BuildTinyModel, path: Path, settings: dict[str, object]) -> None:
    """The same tokens come out in one batch, in batches of three, and prompt by prompt with their numbers."""
    model = tiny_model("qwen2")
    params = SamplingParams(**{"max_new_tokens": 10, "n": 3, "seed": 5, **settings})
    whole = build_token_generator(model, path=path).generate(RAGGED, params)
    generator = build_token_generator(model, path=path, max_batch_size=3)
    assert _tokens(generator.generate(RAGGED, params)) == _tokens(whole)
    order = [4, 0, 3, 1, 2]
    alone = [generator.generate([RAGGED[index]], params, [index]) for index in order]
    for index, made in zip(order, alone, strict=True):
        assert [one.prompt_index for one in made] == [index] * 3
        assert _tokens(made) == _tokens(whole[3 * index : 3 * index + 3])
    rest = generator.generate(RAGGED[3:], attrs.evolve(params, first_prompt=3))
    assert [one.prompt_index for one in rest] == [3] * 3 + [4] * 3
    assert _tokens(rest) == _tokens(whole[9:])


def test_seeds_prompts_and_samples_have_streams_of_their_own(tiny_model: BuildTinyModel) -> None:
    """Equal calls give equal sequences; equal prompts, samples of a prompt and other seeds give different ones."""
    generator = build_token_generator(tiny_model("llama"))
    params = SamplingParams(max_new_tokens=10, n=4)
    made = generator.generate([[3, 4], [3, 4]], params)
    assert generator.generate([[3, 4], [3, 4]], params) == made
    other = generator.generate([[3, 4], [3, 4]], SamplingParams(max_new_tokens=10, n=4, seed=1))
    assert len({*_tokens(made), *_tokens(other)}) == 16


def test_sampled_frequencies_fit_the_model(tiny_model: BuildTinyModel) -> None:
    """The first tokens of 6000 samples fit the softmax of the model: chi-square is below its 1 - 1e-6 quantile."""
    model = tiny_model("llama")
    params = SamplingParams(max_new_tokens=1, n=6000, temperature=1.3)
    made = build_token_generator(model, max_batch_size=6000).generate([[5, 6, 7]], params)
    with torch.no_grad():
        logits_V = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    expected_V = 6000 * (logits_V / 1.3).softmax(-1)
    counts_V = torch.bincount(torch.tensor([one.token_ids[0] for one in made]), minlength=61)
    # Tokens that are expected fewer than 5 times are counted as one, as the chi-square approximation asks for.
    is_rare_V = expected_V < 5
    counts = torch.cat([counts_V[~is_rare_V], counts_V[is_rare_V].sum()[None]])
    expected = torch.cat([expected_V[~is_rare_V], expected_V[is_rare_V].sum()[None]])
    freedom = len(expected) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 4.753 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson-Hilferty
    assert ((counts - expected) ** 2 / expected).sum() < bound


@pytest.mark.parametrize("path", PATHS)
def test_generation_stops_when_every_sequence_has(tiny_model: BuildTinyModel, path: Path) -> None:
    """With every token a stop token each completion is one token, the stop token, and its reason is "stop"."""
    params = SamplingParams(max_new_tokens=20, stop_token_ids=tuple(range(61)), n=2)
    made = build_token_generator(tiny_model("qwen2"), path=path).generate(RAGGED, params)
    assert {len(one.token_ids) for one in made} == {1}
    assert {one.finish_reason for one in made} == {"stop"}


def test_no_prompts_give_no_completions(tiny_model: BuildTinyModel) -> None:
    """An empty request is legal and gives nothing, as it happens on ranks that have no share."""
    assert build_token_generator(tiny_model("llama")).generate([], SamplingParams()) == ()


def test_the_context_can_be_filled(tiny_model: BuildTinyModel) -> None:
    """A prompt and its completion may fill the context exactly, and one token more is refused."""
    generator = build_token_generator(tiny_model("llama"))
    made = generator.generate([[1] * 60], SamplingParams(max_new_tokens=4))
    assert made[0].finish_reason == "length"
    with pytest.raises(ConfigError, match="max_new_tokens=5"):
        generator.generate([[1] * 60], SamplingParams(max_new_tokens=5))
    with pytest.raises(DataError, match="prompt_indices"):
        generator.generate([[1]], SamplingParams(max_new_tokens=4), [1, 2])


def test_the_path_and_its_reason_are_told(tiny_model: BuildTinyModel) -> None:
    """The fused decoder is taken where it can be; elsewhere the reason is told, and insisting is an error with it."""
    fused = build_token_generator(tiny_model("qwen3"))
    assert (fused.path, fused.fallback_reason) == ("fused", "")
    fallen_back = build_token_generator(tiny_model("mistral"))
    assert fallen_back.path == "transformers"
    assert "MistralForCausalLM" in fallen_back.fallback_reason
    asked = build_token_generator(tiny_model("qwen3"), path="transformers")
    assert (asked.path, asked.fallback_reason) == ("transformers", "path='transformers' was asked for")
    with pytest.raises(UnsupportedError, match=r"MistralForCausalLM.*path='auto'"):
        build_token_generator(tiny_model("mistral"), path="fused")
    with pytest.raises(ConfigError, match="max_batch_size=0"):
        build_token_generator(tiny_model("qwen3"), max_batch_size=0)


@pytest.mark.parametrize("path", PATHS)
def test_new_weights_are_followed(tiny_model: BuildTinyModel, path: Path) -> None:
    """After the weights changed and a refresh, a generator makes what a new one makes."""
    model = tiny_model("llama")
    generator = build_token_generator(model, path=path)
    params = SamplingParams(max_new_tokens=8)
    before = generator.generate(RAGGED, params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    generator.refresh()
    after = generator.generate(RAGGED, params)
    assert after == build_token_generator(model, path=path).generate(RAGGED, params)
    assert after != before


def test_released_weights_must_be_refreshed(tiny_model: BuildTinyModel) -> None:
    """After a release nothing is generated until a refresh, and then the same as before."""
    generator = build_token_generator(tiny_model("llama"))
    params = SamplingParams(max_new_tokens=3)
    before = generator.generate([[1]], params)
    generator.release()
    with pytest.raises(EngineStateError, match="refresh"):
        generator.generate([[1]], params)
    generator.refresh()
    assert generator.generate([[1]], params) == before


@pytest.mark.parametrize("path", PATHS)
def test_dropout_is_off_and_modes_are_kept(tiny_model: BuildTinyModel, path: Path) -> None:
    """A model in train mode generates what it does in eval mode, and each of its modules keeps its own mode."""
    model = tiny_model("llama", attention_dropout=0.5)
    params = SamplingParams(max_new_tokens=6, temperature=0.0)
    expected = build_token_generator(model, path=path).generate(RAGGED, params)
    model.train()
    model.get_submodule("model.layers.0").eval()
    modes = [module.training for module in model.modules()]
    assert build_token_generator(model, path=path).generate(RAGGED, params) == expected
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(tiny_model: BuildTinyModel, path: Path, temperature: float) -> None:
    """A model whose logits are nan raises, with the prompt's number, and no tokens come out."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    generator = build_token_generator(model, path=path)
    with pytest.raises(EngineStateError, match=r"prompt 7 \(sample 0\)"):
        generator.generate([[1], [2]], SamplingParams(max_new_tokens=3, temperature=temperature), [7, 8])


@pytest.mark.parametrize("path", PATHS)
def test_the_prompt_whose_logits_are_not_finite_is_named(tiny_model: BuildTinyModel, path: Path) -> None:
    """Of several prompts the one whose token has a row of nan is named, and its first sample."""
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[40] = float("nan")
    generator = build_token_generator(model, path=path)
    params = SamplingParams(max_new_tokens=2, n=2, temperature=0.0)
    with pytest.raises(EngineStateError, match=r"after prompt 2 \(sample 0\) are not finite; load finite weights"):
        generator.generate([[1], [2, 3], [40], [5]], params)


def test_importing_it_does_not_import_transformers() -> None:
    """The package transformers is optional: modules that are handed a model only name its type."""
    code = "import sys, lightrft.backends.rollout.hf.generation; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603  # our own code


def test_sequences_that_ended_are_not_decoded_further(tiny_model: BuildTinyModel) -> None:
    """Once half of a batch has ended the others go on alone, and nothing is decoded when all have ended.

    Of each sequence only the last position's logits are made.
    """
    model = tiny_model("llama")
    params = SamplingParams(max_new_tokens=12, temperature=0.0)
    generator = build_token_generator(model, path="transformers")
    free = _tokens(generator.generate(RAGGED, params))
    rows: list[tuple[int, int]] = []

    def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        del module
        rows.append((args[0].shape[0], args[0].shape[1]))

    with_hook = model.get_output_embeddings().register_forward_pre_hook(watch)
    stops = tuple({tokens[2] for tokens in free[:4]})
    made = generator.generate(RAGGED, attrs.evolve(params, stop_token_ids=stops))
    with_hook.remove()
    ends = [len(one.token_ids) if one.finish_reason == "stop" else 12 for one in made]
    assert {width for _, width in rows} == {1}
    batch, batches = len(RAGGED), [len(RAGGED)]  # the prompt's own forward, whatever its order
    for made_so_far in range(1, max(ends)):
        live = sum(end > made_so_far for end in ends)
        batch = live if live <= batch / 2 else batch
        batches.append(batch)
    assert [count for count, _ in rows] == batches
    assert batches[-1] < len(RAGGED)
    assert generator.generate([RAGGED[0]], attrs.evolve(params, stop_token_ids=free[0][:1]))[0].token_ids == free[0][:1]


def test_a_model_that_is_set_to_keep_no_cache_generates(tiny_model: BuildTinyModel) -> None:
    """`use_cache=False` in a model's config, as training sets it, changes no token."""
    params = SamplingParams(max_new_tokens=4, temperature=0.0)
    model = tiny_model("llama")
    expected = _tokens(build_token_generator(model, path="transformers").generate(RAGGED, params))
    model.config.use_cache = False
    assert _tokens(build_token_generator(model, path="transformers").generate(RAGGED, params)) == expected
