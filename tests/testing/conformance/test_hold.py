"""Every strategy and engine of ours obeys every law, and what came of a law is told in full."""

from __future__ import annotations

import functools
import re
from itertools import pairwise
from typing import cast

import attrs
import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from lightrft.config import EngineConfig
from lightrft.errors import ConfigError, LawError, MissingPackageError
from lightrft.strategy import ENGINES, STRATEGIES, Strategy, StrategyConfig
from lightrft.strategy.protocols import CAPABILITIES, BuildStrategy, Capabilities, Engine, EngineHandle, EngineSource
from lightrft.testing.conformance.hold import draw_settings, hold, hold_law, run_on
from lightrft.testing.conformance.report import Finding
from lightrft.testing.conformance.target import claims_of
from lightrft.testing.law import Harness, Law, Worlds, for_all
from lightrft.testing.laws.registry import ENGINE_LAWS, STRATEGY_LAWS, choose_laws
from lightrft.testing.ranks.processes import processes
from lightrft.testing.ranks.spawn import SpawnRank
from lightrft.testing.replicated import build_simulated
from lightrft.testing.subject import Rank, Subject, subject_of

NUM_EXAMPLES = 5
"""Few, so that the tests stay fast; `lightrft conformance` and `make laws` draw more."""

LAWS = {**STRATEGY_LAWS, **ENGINE_LAWS}
SHARDING: list[dict[str, object]] = [
    {"strategy": "fsdp2"},
    {"strategy": "deepspeed", "zero_stage": 3, "zero_persistence_threshold": 0},  # 0 shards small parameters too
]
SINGLE = subject_of("single", "strategy")


@pytest.mark.parametrize("law", STRATEGY_LAWS)
@pytest.mark.parametrize("target", STRATEGIES)
def test_every_strategy_obeys_every_law(target: str, law: str) -> None:
    """On one rank no law is broken by a strategy that is registered."""
    assert broken(subject_of(target, "strategy"), law) == []


@pytest.mark.parametrize("law", ENGINE_LAWS)
@pytest.mark.parametrize("target", ENGINES)
def test_every_engine_obeys_every_law(target: str, law: str) -> None:
    """No law is broken by an engine that is registered; `make test-vllm` and `test-sglang` say so of the others."""
    try:
        ENGINES[target](EngineConfig())
    except MissingPackageError as error:
        pytest.skip(str(error))
    assert broken(subject_of(target, "engine"), law) == []


@pytest.mark.parametrize("law", STRATEGY_LAWS)
def test_several_ranks_obey_every_law(law: str) -> None:
    """On two and three simulated ranks no law is broken by replicated training."""
    report = hold(
        subject_of(build_simulated, "strategy"),
        [STRATEGY_LAWS[law]],
        world_sizes=(2, 3),
        max_examples=NUM_EXAMPLES,
        ranks="simulated",
    )
    assert [finding for finding in report.findings if finding.outcome == "broken"] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", SHARDING, ids=str)
def test_two_processes_obey_every_law(settings: dict[str, object]) -> None:
    """On two processes no law is broken by what shards; `make laws-of-ranks` takes every stage, and 1 to 4 ranks."""
    config = StrategyConfig.from_mapping(settings)
    report = hold(
        subject_of(str(config.strategy), "strategy", config=config),
        list(STRATEGY_LAWS.values()),
        world_sizes=(2,),
        max_examples=1,
        ranks="processes",
    )
    assert [finding for finding in report.findings if finding.outcome == "broken"] == []


def test_an_engine_on_each_of_two_processes_obeys_every_law(spawn: SpawnRank) -> None:
    """Each rank has an engine of its own, in a real group; so `lightrft conformance hf --world-size 2` does."""
    subject = subject_of("scripted", "engine")
    claims = claims_of(subject)
    with processes(subject, 2, spawn=spawn) as run:
        harness = Harness(subject=subject, run=run, world_size=2, settings=draw_settings(2), seed=0, example=None)
        found = [hold_law(law, harness, claims=claims) for law in ENGINE_LAWS.values()]
    assert [finding for finding in found if finding.outcome == "broken"] == []
    assert {"engine.record", "engine.update", "engine.close", "engine.life"} <= {
        finding.law for finding in found if finding.outcome == "holds"
    }


def broken(subject: Subject, law: str) -> list[Finding]:
    """Return what says that the subject breaks the law."""
    report = hold(subject, [LAWS[law]], max_examples=NUM_EXAMPLES)
    return [finding for finding in report.findings if finding.outcome == "broken"]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_a_sentence_with_a_name(law: str) -> None:
    """An id is a section and a name, a statement is one short sentence, and what is required is a capability."""
    assert re.fullmatch(r"[a-z]+\.[a-z0-9_]+", law)
    assert re.fullmatch(r"[A-Za-z_].{20,260}\.", LAWS[law].statement)
    assert LAWS[law].requires <= CAPABILITIES.keys()


def test_laws_of_strategies_stand_in_the_order_in_which_people_read_them() -> None:
    """Sections come one after the other: from the configuration and the record to whole lives."""
    sections = dict.fromkeys(law.partition(".")[0] for law in STRATEGY_LAWS)
    assert list(sections) == [
        "config",
        "record",
        "collectives",
        "step",
        "training",
        "checkpoint",
        "export",
        "rollout",
        "composition",
        "life",
    ]
    changes = sum(before.partition(".")[0] != after.partition(".")[0] for before, after in pairwise(STRATEGY_LAWS))
    assert changes == len(sections) - 1


def test_laws_are_chosen_by_id_and_pattern() -> None:
    """Laws come in their own order, each once; what names none is an error with the nearest id."""
    chosen = choose_laws("strategy", ["step.*", "record.frozen", "step.accumulation"])
    names = [law.id for law in chosen]
    assert len(LAWS) == len(STRATEGY_LAWS) + len(ENGINE_LAWS)
    assert names == [law for law in STRATEGY_LAWS if law.startswith("step.") or law == "record.frozen"]
    assert len(choose_laws("engine")) == len(ENGINE_LAWS)
    with pytest.raises(
        ConfigError, match=r"laws='step\.acumulation' names no strategy law; did you mean 'step\.accumulation'"
    ):
        choose_laws("strategy", ["step.acumulation"])


def build_renamed(config: StrategyConfig) -> Strategy:
    """Return a strategy with another name of a parameter."""

    def get_rank(place: int = 0) -> int:
        return place

    return attrs.evolve(STRATEGIES["single"](config), get_rank=get_rank)


def build_bound(config: StrategyConfig) -> Strategy:
    """Return a strategy with a function that was made by partial, which checkers take for anything."""
    single = STRATEGIES["single"](config)
    return attrs.evolve(single, broadcast=functools.partial(single.all_reduce, op="sum"))


def build_mutable(config: StrategyConfig) -> Strategy:
    """Return a look-alike that can be changed."""
    fields = {field.name: attrs.field() for field in attrs.fields(Strategy)}
    made = attrs.make_class("Mutable", fields, kw_only=True)
    return cast("Strategy", made(**attrs.asdict(STRATEGIES["single"](config), recurse=False)))


def build_incomplete(config: StrategyConfig) -> Strategy:
    """Return a look-alike that lacks a function."""
    fields = {field.name: attrs.field() for field in attrs.fields(Strategy) if field.name != "offload"}
    made = attrs.make_class("Incomplete", fields, kw_only=True, frozen=True)
    single = attrs.asdict(STRATEGIES["single"](config), recurse=False)
    del single["offload"]
    return cast("Strategy", made(**single))


@pytest.mark.parametrize(
    ("build", "broken_law", "words"),
    [
        (build_renamed, "record.signatures", "get_rank: parameter 'place=0' is not in the contract"),
        (build_bound, "record.signatures", "broadcast: "),
        (build_mutable, "record.frozen", "frozen"),
        (build_incomplete, "record.signatures", "offload"),
    ],
)
def test_a_record_that_is_no_strategy_is_found(build: BuildStrategy, broken_law: str, words: str) -> None:
    """A wrong parameter, a partial, a record that can be changed and a missing field each break a law of the record."""
    findings = hold(subject_of(build, "strategy"), choose_laws("strategy", ["record.*"]), max_examples=10).findings
    messages = {finding.law: finding.message for finding in findings if finding.outcome == "broken"}
    assert words in messages[broken_law]


@attrs.frozen(kw_only=True)
class Number:
    """A case.

    Attributes:
        value: a number.
    """

    value: int


def numbers(world_size: int) -> SearchStrategy[Number]:
    """Draw cases."""
    return st.builds(Number, value=st.integers(0, 100 * world_size))


def rank_plus(rank: Rank, number: Number) -> int:
    """Run on every rank."""
    return rank.rank + number.value


def below_seven(harness: Harness, number: Number) -> None:
    """Break from seven on."""
    if max(harness.run(rank_plus, number)) > 6:
        raise LawError(f"{number.value} was seen and must be below 7")


def divided(harness: Harness, number: Number) -> None:
    """Raise something else than a law would."""
    del harness
    if number.value > 2:
        raise ZeroDivisionError("by nothing")


def leaves(harness: Harness) -> None:
    """End the process, as nothing in a library may."""
    raise SystemExit(str(harness.world_size))


def law(name: str = "small", *, requires: Capabilities = frozenset(), worlds: Worlds = "every") -> Law:
    """Return a law that is broken for numbers from seven on."""
    check = for_all(numbers, below_seven)
    return Law(id=f"number.{name}", statement="Numbers are small.", requires=requires, check=check, worlds=worlds)


def test_the_smallest_example_is_told_and_can_be_looked_at_again() -> None:
    """A broken law comes with the smallest case and a command; with the case as `example` it is broken again."""
    (finding,) = hold(SINGLE, [law()]).findings
    assert (finding.outcome, finding.example) == ("broken", '{"value": 7}')
    assert finding.message == "7 was seen and must be below 7"
    assert finding.command == """lightrft conformance single --laws number.small --example '{"value": 7}'"""
    (again,) = hold(SINGLE, [law()], example='{"value": 9}').findings
    assert (again.outcome, again.example) == ("broken", '{"value": 9}')
    (fine,) = hold(SINGLE, [law()], example='{"value": 6}').findings
    assert fine.outcome == "holds"


def test_a_broken_law_stops_no_other() -> None:
    """Any exception breaks a law, with its type in the message, and the next law is held."""
    raising = attrs.evolve(law("raising"), check=for_all(numbers, divided))
    leaving = attrs.evolve(law("leaving"), check=leaves)
    seen: list[str] = []

    def show(finding: Finding) -> None:
        seen.append(finding.law)

    findings = hold(SINGLE, [raising, leaving, law()], on_finding=show).findings
    assert [finding.message.partition("\n")[0] for finding in findings[:2]] == [
        "ZeroDivisionError: by nothing",
        "SystemExit: 1",
    ]
    assert findings[0].example == '{"value": 3}'
    assert findings[1].command.endswith("--laws number.leaving --seed 0 --max-examples 30")
    assert seen == ["number.raising", "number.leaving", "number.small"]


def test_what_is_not_claimed_is_said_and_not_held() -> None:
    """A law about a capability that nobody claims is not held; the capability is named."""
    (images,) = hold(SINGLE, [law(requires=frozenset({"images"}))]).findings
    assert (images.outcome, images.message) == ("not claimed", "'images' is not claimed")
    (ranks,) = hold(SINGLE, [law(worlds="several")]).findings
    assert (ranks.outcome, ranks.message) == ("not claimed", "'ranks' is not claimed")
    (engine,) = hold(subject_of("hf", "engine"), [law(requires=frozenset({"sampling"}))]).findings
    assert engine.outcome == "broken"


@pytest.mark.parametrize(("worlds", "sizes"), [("one", []), ("every", [2, 3]), ("several", [2, 3])])
def test_a_law_is_held_where_it_says_something(worlds: Worlds, sizes: list[int]) -> None:
    """On two and three ranks a law of one rank is not held, and the others are; the command names the ranks."""
    subject = subject_of(build_simulated, "strategy")
    findings = hold(subject, [law(worlds=worlds)], world_sizes=(2, 3), ranks="simulated").findings
    assert [finding.world_size for finding in findings] == sizes
    for finding in findings:
        assert finding.example == f'{{"value": {8 - finding.world_size}}}'
        assert f"--world-size {finding.world_size} --ranks simulated" in finding.command


def test_the_command_names_all_that_was_set() -> None:
    """Settings, an engine that is not the default, and a kind that the target does not tell are in the command."""
    config = StrategyConfig(zero_stage=3, lr_scheduler="linear", extra_args={"noise": 0.5})
    subject = attrs.evolve(subject_of("single", "strategy", config=config), name="fake:build")
    (finding,) = hold(attrs.evolve(subject, engine=attrs.evolve(subject.engine, type="hf")), [law()]).findings
    assert finding.command.startswith(
        "lightrft conformance fake:build zero_stage=3 lr_scheduler=linear extra_args.noise=0.5 "
        "--engine hf --kind strategy --laws"
    )


def test_a_law_can_be_held_alone() -> None:
    """`hold_law` takes what `hold` makes of its arguments."""
    with run_on(SINGLE, None, 1) as run:
        report = hold(SINGLE, [law()], max_examples=1)
        assert report.findings[0].outcome == "holds"
        harness = Harness(
            subject=SINGLE, run=run, world_size=1, settings=draw_settings(1), seed=0, example='{"value": 8}'
        )
        assert hold_law(law(), harness, claims=frozenset()).outcome == "broken"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"example": "{}"}, r"example='\{\}' is no .*Number"),
        ({"example": "{", "num_laws": 2}, "is of one law and 2 are chosen"),
        ({"world_sizes": ()}, "holds nothing; give at least one"),
        ({"world_sizes": (0,)}, "world_size=0 is no number of ranks"),
        ({"seed": -1}, "seed=-1 is below 0"),
        ({"world_sizes": (2,), "ranks": "here"}, "ranks='here' is one rank"),
        ({"max_examples": 0}, "max_examples=0 looks at nothing"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, object], words: str) -> None:
    """What makes no sense is a ConfigError, and no finding."""
    laws = [law()] * int(str(arguments.pop("num_laws", 1)))
    with pytest.raises(ConfigError, match=words):
        hold(SINGLE, laws, **arguments)  # type: ignore[arg-type]


def test_a_subject_that_cannot_be_built_is_no_finding() -> None:
    """No law can say anything, so that it is an error, and so is an engine's own refusal."""

    def build(config: StrategyConfig) -> Strategy:
        raise RuntimeError(config.lr_scheduler)

    def build_engine(config: EngineConfig) -> Engine:
        raise MissingPackageError(config.type)

    with pytest.raises(ConfigError, match=r"cannot be built \(RuntimeError: cosine\); make it a function of one arg"):
        hold(subject_of(build, "strategy"), [law()])
    with pytest.raises(MissingPackageError, match="subject"):
        hold(subject_of(build_engine, "engine"), [law()])


def test_engines_are_not_held_on_simulated_ranks() -> None:
    """There is no group that they would be in."""
    with pytest.raises(ConfigError, match=r"ranks='simulated' is for strategies .*, and 'hf' is an engine; use"):
        hold(subject_of("hf", "engine"), [law()], world_sizes=(2,), ranks="simulated")


def test_an_engine_that_breaks_while_it_starts_is_held_to_everything() -> None:
    """It cannot say what it claims, so no law is left out."""

    def start(source: EngineSource) -> EngineHandle:
        raise RuntimeError(str(source.tokenizer))

    def build_engine(config: EngineConfig) -> Engine:
        return attrs.evolve(ENGINES["scripted"](config), start=start)

    (finding,) = hold(subject_of(build_engine, "engine"), [law(requires=frozenset({"images"}))]).findings
    assert finding.outcome == "broken"
