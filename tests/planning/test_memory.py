"""The formulas of memory, held to sums that were worked out by hand."""

from __future__ import annotations

import attrs
import pytest

from lightrft.planning.activations import DecoderSizes
from lightrft.planning.line import Line, summary_of, total_bytes
from lightrft.planning.memory import ModelSizes, ParameterSize, Sharing, Work, memory_of_rank

# 10 x 3 and 4 x 2 in the first layer, 7 x 1 in the second, and around them a frozen 5 x 5 and a number alone
FIRST = (ParameterSize(num_rows=10, num_elements=30), ParameterSize(num_rows=4, num_elements=8))
SECOND = (ParameterSize(num_rows=7, num_elements=7),)
AROUND = (ParameterSize(num_rows=5, num_elements=25, is_trained=False), ParameterSize(num_rows=0, num_elements=1))
SIZES = ModelSizes(groups=(FIRST, SECOND, AROUND))
WORK = Work(num_positions=6, chunk_rows=4)
DECODER = DecoderSizes(
    num_layers=3, hidden=10, attention=8, key_value=4, intermediate=20, vocabulary=100, has_head_norms=True
)


def lines_of(sharing: Sharing, work: Work = WORK, sizes: ModelSizes = SIZES) -> dict[str, Line]:
    return {line.name: line for line in memory_of_rank(sizes, sharing, work)}


def bytes_of(sharing: Sharing, work: Work = WORK, sizes: ModelSizes = SIZES) -> dict[str, int]:
    return {name: line.num_bytes for name, line in lines_of(sharing, work, sizes).items()}


def test_one_rank_holds_everything() -> None:
    """Four bytes for each parameter and each gradient, eight of state for each that is trained, and step counts."""
    assert bytes_of(Sharing()) == {"parameters": 4 * 71, "gradients": 4 * 46, "optimizer state": 8 * 46 + 4 * 4}


def test_rows_are_spread_whole() -> None:
    """Of 3 ranks the first has 4 of 10 rows, 2 of 4, 3 of 7, 2 of 5, and each has the number alone."""
    own, frozen = 4 * 3 + 2 * 2 + 3 + 1, 2 * 5
    sharing = Sharing(parameter_ranks=3, gradient_ranks=3, optimizer_ranks=3, by_rows=True)
    assert bytes_of(sharing) == {
        "parameters": 4 * (own + frozen),
        "gradients": 4 * own,
        "optimizer state": 8 * own + 4 * 4,
    }
    assert lines_of(sharing)["gradients"].formula == "4 B x 20 (of 46 over 3 ranks)"


def test_elements_are_spread_one_by_one() -> None:
    """Of 4 ranks the first has 8 of 30, 2 of 8, 2 of 7, 7 of 25 and the number alone; small ones it has whole too."""
    sharing = Sharing(parameter_ranks=4, whole_up_to=8, second_ranks=2, has_copy=True, gathered="all", max_gathered=50)
    found = bytes_of(sharing)
    assert found["parameters"] == 4 * (8 + 2 + 2 + 7 + 1)
    assert found["small parameters"] == 4 * (8 + 7 + 1)
    assert found["second shards"] == 4 * (15 + 4 + 4 + 13 + 1)
    assert found["stepped copy"] == 4 * 46
    assert found["gathered layers"] == 4 * 50
    assert bytes_of(attrs.evolve(sharing, max_gathered=0))["gathered layers"] == 4 * (71 - 16)


@pytest.mark.parametrize(("computing", "width"), [("float32", 4), ("bfloat16", 2)])
def test_two_layers_are_gathered_with_what_is_in_none(computing: str, width: int) -> None:
    """Whole parameters have the width of what is computed with; whole gradients are float32 sums."""
    sizes = ModelSizes(groups=((FIRST[1],), FIRST, SECOND, AROUND))
    found = bytes_of(Sharing(gathered="two layers"), attrs.evolve(WORK, computing=computing), sizes)
    assert found["gathered layers"] == width * (26 + 38 + 8)
    assert found["whole gradients"] == 4 * (38 + 8)
    waiting = bytes_of(Sharing(gathered="two layers", keeps_gradients_whole=True), WORK, sizes)
    assert waiting["whole gradients"] == 4 * (8 + 38 + 7 + 1)


def test_buckets_are_no_larger_than_the_model() -> None:
    """Two of 20 elements, or of 71 where more are allowed."""
    assert bytes_of(Sharing(bucket_elements=20, num_buckets=2))["buckets"] == 4 * 20 * 2
    assert bytes_of(Sharing(bucket_elements=200, num_buckets=2))["buckets"] == 4 * 71 * 2


def test_other_models_and_copies_are_counted_where_there_are_some() -> None:
    """The reference is shared as the parameters are; the engine's weights are whole, and sleep in main memory."""
    work = attrs.evolve(WORK, has_reference=True, has_engine=True, computing="autocast")
    sharing = Sharing(parameter_ranks=3, by_rows=True, offloaded=frozenset({"parameters"}))
    found = lines_of(sharing, work)
    assert found["reference model"].num_bytes == found["parameters"].num_bytes
    assert found["reference model"].place == found["parameters"].place == "host"
    assert (found["engine's weights"].num_bytes, found["engine's weights"].place) == (4 * 71, "device")
    assert lines_of(sharing, attrs.evolve(work, engine_sleeps=True))["engine's weights"].place == "host"
    assert found["bfloat16 copies"].num_bytes == 2 * (30 + 8)  # matrices of layers


def test_a_save_in_the_background_copies_what_this_rank_saves() -> None:
    """Its parts of parameters, state and reference once more, and not what is made of them for a step."""
    work = attrs.evolve(WORK, has_reference=True, has_engine=True, computing="autocast", save_copy="host")
    sharing = Sharing(parameter_ranks=3, optimizer_ranks=3, by_rows=True, has_copy=True, second_ranks=2)
    found = lines_of(sharing, work)
    own, frozen = 4 * 3 + 2 * 2 + 3 + 1, 2 * 5
    assert found["copy to be saved"].num_bytes == 4 * (own + frozen) + (8 * own + 4 * 4) + 4 * (own + frozen)
    assert found["copy to be saved"].place == "host"
    assert found["copy to be saved"].formula == "parameters + optimizer state + reference model"


@pytest.mark.parametrize(
    ("computing", "layer", "around", "kept", "logit"),
    [
        ("float32", 24 * 10 + 16 * 8 + 16 * 4 + 16 * 20, 12 * 10, 4 * 10, 4),
        ("autocast", 26 * 10 + 10 * 8 + 10 * 4 + 8 * 20, 12 * 10, 4 * 10, 4),
        ("bfloat16", 16 * 10 + 10 * 8 + 10 * 4 + 8 * 20, 8 * 10, 2 * 10, 6),
    ],
)
def test_activations_and_logits(computing: str, layer: int, around: int, kept: int, logit: int) -> None:
    """A layer keeps all of its numbers, or its input alone; logits exist for a chunk of positions at a time."""
    sizes = attrs.evolve(SIZES, decoder=DECODER)
    found = lines_of(Sharing(), attrs.evolve(WORK, computing=computing), sizes)
    assert found["activations"].num_bytes == 6 * (3 * layer + around)
    assert found["activations, recomputed"].num_bytes == 6 * (3 * kept + layer + around)
    assert found["logits chunk"].num_bytes == logit * 4 * 100
    assert found["gradient of the head"].num_bytes == 4 * 100 * 10


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_one_way_to_keep_activations_counts(is_recomputed: bool) -> None:
    """Both lines are there, and the sum has one of them."""
    lines = lines_of(Sharing(), attrs.evolve(WORK, is_recomputed=is_recomputed), attrs.evolve(SIZES, decoder=DECODER))
    kept, recomputed = lines["activations"], lines["activations, recomputed"]
    left_out = kept if is_recomputed else recomputed
    assert [line for line in lines.values() if line.place == "not counted"] == [left_out]
    assert total_bytes(lines.values(), "device") == sum(line.num_bytes for line in lines.values()) - left_out.num_bytes


def test_a_summary_names_each_place() -> None:
    """What lies in main memory is said where there is some."""
    here = Line(name="parameters", num_bytes=2048, formula="")
    assert summary_of([here], "cuda") == "about 2.00 KiB on cuda"
    there = attrs.evolve(here, place="host")
    assert summary_of([here, there], "cuda") == "about 2.00 KiB on cuda, 2.00 KiB in main memory"
