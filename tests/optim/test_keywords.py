"""Keywords as torch's namesakes have them, and what is said of those that nobody has: misspelt, or in the wrong place."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.optim.arguments import PASSED_OVER
from fusedfog.optim.options import Keywords, Options

KINDS = ("SGD", "Adam", "AdamW", "AccumAdamW", "Decentralized")
NAMESAKES = ("SGD", "Adam", "AdamW")
DECENTRALIZED = frozenset(Keywords.__annotations__)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4)), nn.Parameter(torch.ones(3))]


def test_keywords_and_options_are_one_list() -> None:
    assert {field.name for field in fields(Options)} - {"clock", "equal_inside"} == DECENTRALIZED


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_spell_every_keyword_out(kind: str) -> None:
    for target in (getattr(fusedfog, kind), getattr(fusedfog, kind).__init__):
        shown = inspect.signature(target).parameters
        assert not [one for one in shown.values() if one.kind is one.VAR_KEYWORD]
        assert set(shown) >= DECENTRALIZED
        for name in DECENTRALIZED:
            assert shown[name].default == getattr(Options, name)
            assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
    opt = torch.optim.SGD(parameters(), lr=0.1) if kind == "Decentralized" else parameters()
    plain = {name: getattr(Options, name) for name in DECENTRALIZED}
    getattr(fusedfog, kind)(opt, **plain)


@pytest.mark.parametrize("kind", NAMESAKES)
def test_the_arguments_of_the_namesake_are_there_in_its_order_and_with_its_defaults(kind: str) -> None:
    ours = inspect.signature(getattr(fusedfog, kind)).parameters
    theirs = inspect.signature(getattr(torch.optim, kind)).parameters
    positional = [name for name, one in theirs.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    for name, one in theirs.items():
        assert ours[name].default == one.default, name
        assert ours[name].kind == one.kind, name


@pytest.mark.parametrize("kind", NAMESAKES)
@pytest.mark.parametrize("hints", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
def test_foreach_and_fused_are_hints_that_change_nothing(kind: str, hints: dict[str, Any]) -> None:
    plain, hinted = parameters(), parameters()
    opts = [getattr(fusedfog, kind)(plain, lr=0.1), getattr(fusedfog, kind)(hinted, lr=0.1, **hints)]
    for _ in range(3):
        for opt, params in zip(opts, (plain, hinted), strict=True):
            for param in params:
                param.grad = param.detach() * 2 + 1
            opt.step()
    assert all(torch.equal(one, other) for one, other in zip(plain, hinted, strict=True))
    assert {name: opts[1].param_groups[0][name] for name in hints} == hints


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "AccumAdamW"])
def test_differentiable_is_refused_with_a_way_out(kind: str) -> None:
    make = getattr(fusedfog, kind)
    for attempt in (
        lambda: make(parameters(), lr=0.1, differentiable=True),
        lambda: make([{"params": parameters(), "differentiable": True}], lr=0.1),
    ):
        with pytest.raises(ValueError, match=r"differentiable=True: .*use torch\.optim\."):
            attempt()


def test_adam_decays_as_torchs_with_decoupled_weight_decay() -> None:
    ours, theirs = parameters(), parameters()
    keywords: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True}
    opts = [fusedfog.Adam(ours, **keywords), torch.optim.Adam(theirs, **keywords)]
    for _ in range(5):
        for opt, params in zip(opts, (ours, theirs), strict=True):
            for param in params:
                param.grad = param.detach() * 2 + 1
            opt.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", NAMESAKES)
@pytest.mark.parametrize("theirs", [{}, {"foreach": True}, {"fused": True}])
def test_state_dicts_go_to_the_namesake_and_back(kind: str, theirs: dict[str, Any]) -> None:
    momentum = {"momentum": 0.9} if kind == "SGD" else {}
    params = parameters()
    ours = getattr(fusedfog, kind)(params, lr=0.1, **momentum)
    other = getattr(torch.optim, kind)(parameters(), lr=0.3, **theirs, **momentum)
    namesake = getattr(torch.optim, kind)(parameters(), lr=0.1)
    for name in namesake.param_groups[0]:
        assert name in ours.param_groups[0]
    for first, second in ((ours, other), (other, ours)):
        for param in [p for group in first.param_groups for p in group["params"]]:
            param.grad = torch.ones_like(param)
        first.step()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for name in other.param_groups[0].keys() - {"params", "fusedfog"}:
            assert second.param_groups[0][name] == first.param_groups[0][name]
        for param in [p for group in second.param_groups for p in group["params"]]:
            param.grad = torch.ones_like(param)
        second.step()


def test_a_capturable_checkpoint_of_torch_loads_into_any_algorithm() -> None:
    saved = torch.optim.AdamW(parameters(), lr=0.1, capturable=True).state_dict()
    opt = fusedfog.AdamW(parameters(), lr=0.1, algorithm="atc", fused_backward=True)
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["capturable"] is False


def test_capturable_is_the_whole_optimizers() -> None:
    with pytest.raises(ValueError, match="give it to AdamW itself"):
        fusedfog.AdamW([{"params": parameters(), "capturable": True}])
    assert fusedfog.AdamW(parameters(), capturable=True).param_groups[0]["capturable"] is True


def hints_differ() -> None:
    rank = fusedfog.rank()
    fusedfog.AdamW(parameters(), lr=0.1, foreach=bool(rank), fused=None if rank else False).step()


def test_ranks_need_not_agree_on_hints(ranks: Pool) -> None:
    ranks.run(2, hints_differ)


# -- misspelt --------------------------------------------------------------------------------------------------------

TYPOS = [
    ("topologgy", "topology"), ("topolgy", "topology"), ("graph", "topology"), ("algoritm", "algorithm"),
    ("communicate_evry", "communicate_every"), ("max_grad_nrom", "max_grad_norm"), ("Model", "model"), ("wire", "wire_dtype"),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("typo", "meant"), TYPOS)
def test_a_misspelt_keyword_is_told_which_one_was_meant(kind: str, typo: str, meant: str) -> None:
    given = torch.optim.SGD(parameters(), lr=0.1) if kind == "Decentralized" else parameters()
    says = rf"{kind}\(\) got an unexpected keyword argument '{typo}'; did you mean '{meant}'\?"
    with pytest.raises(TypeError, match=says):
        getattr(fusedfog, kind)(given, **{typo: None})


@pytest.mark.parametrize(("typo", "meant"), [("learning_rate", "lr"), ("wd", "weight_decay"), ("momentun", "momentum")])
def test_torchs_own_keywords_are_meant_too(typo: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
        fusedfog.SGD(parameters(), **{typo: 0.1})  # type: ignore[arg-type]


def test_a_keyword_that_resembles_none_and_one_that_is_internal_are_refused_plainly() -> None:
    for name in ("qqqq", "clock"):
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}'$"):
            fusedfog.SGD(parameters(), **{name: 1})  # type: ignore[arg-type]


def test_keywords_of_the_wrapped_optimizer_are_sent_there() -> None:
    with pytest.raises(TypeError, match="takes no 'lr': give it to the RMSprop that it wraps"):
        fusedfog.Decentralized(torch.optim.RMSprop(parameters()), lr=0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("keywords", "meant"),
    [
        ({"algorithm": "actc"}, "atc"),
        ({"algorithm": "AWC"}, "awc"),
        ({"algorithm": "gradient_trackin"}, "gradient_tracking"),
        ({"topology": "exponentail"}, "exponential"),
        ({"topology": "Ring"}, "ring"),
        ({"wire_dtype": "bfloat16"}, "bf16"),
        ({"wire_dtype": "fp88"}, "fp8"),
        ({"low_precision": "kahn"}, "kahan"),
        ({"nonfinite": "contian"}, "contain"),
    ],
)
def test_a_misspelt_value_is_told_which_one_was_meant(keywords: dict[str, Any], meant: str) -> None:
    with pytest.raises(ValueError, match=rf"; did you mean '{meant}'\?"):
        fusedfog.SGD(parameters(), lr=0.1, **keywords)


# -- in place of parameters ------------------------------------------------------------------------------------------

MODEL = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))

INSTEAD: dict[str, tuple[Callable[[], Any], str]] = {
    "a module": (lambda: MODEL, r"torch.nn.Module, Sequential, in place of parameters: pass model.parameters\(\)"),
    "modules": (lambda: [MODEL], "torch.nn.Module, Sequential, in place of parameters .entry 0"),
    "its children": (lambda: MODEL.children(), "torch.nn.Module, Linear"),
    "its named children": (lambda: MODEL.named_children(), "torch.nn.Module, Linear"),
    "a module among parameters": (lambda: [*MODEL.parameters(), MODEL], "entry 4"),
    "a group of a module": (lambda: [{"params": MODEL}], "torch.nn.Module, Sequential.*param group 0"),
    "a group of modules": (lambda: [{"params": [MODEL]}], "torch.nn.Module, Sequential.*param group 0"),
    "a group alone": (lambda: {"params": MODEL.parameters()}, r"pass a list of param groups, \[group\]"),
    "a state dict": (lambda: MODEL.state_dict(), r"pass model.parameters\(\)"),
    "a dict": (lambda: OrderedDict(MODEL.named_parameters()), r"pass model.parameters\(\)"),
    "a name": (lambda: "model", r"the str 'model' in place of parameters: pass model.parameters\(\)"),
    "names": (lambda: ["weight"], "the str 'weight'"),
    "an optimizer": (lambda: torch.optim.SGD(parameters()), r"wrap it, fusedfog.Decentralized\(optimizer\)"),
}


@pytest.mark.parametrize("what", INSTEAD)
def test_what_is_commonly_passed_in_place_of_parameters_is_named(what: str) -> None:
    make, says = INSTEAD[what]
    with pytest.raises(TypeError, match=says):
        fusedfog.AdamW(make(), lr=0.1)


@pytest.mark.parametrize("params", [MODEL, [MODEL]])
def test_added_groups_are_checked_too(params: Any) -> None:
    for opt in (fusedfog.SGD(parameters(), lr=0.1), fusedfog.Decentralized(torch.optim.SGD(parameters(), lr=0.1))):
        with pytest.raises(TypeError, match=r"Module, Sequential.*param group 1"):
            opt.add_param_group({"params": params})
        assert len(opt.param_groups) == 1


def test_decentralized_says_what_it_wraps() -> None:
    with pytest.raises(TypeError, match=r"torch.nn.Module, Sequential, in place of an optimizer"):
        fusedfog.Decentralized(MODEL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ParameterList(parameters()),
        lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(3))}).values(),
        lambda: MODEL.parameters(),
        lambda: MODEL.named_parameters(),
        lambda: (p for p in parameters()),
        lambda: [{"params": MODEL.parameters()}, {"params": nn.ParameterList(parameters()), "lr": 0.2}],
        lambda: [{"params": torch.nn.Parameter(torch.ones(3))}],
    ],
)
def test_what_torch_takes_is_taken(make: Callable[[], Any]) -> None:
    torch.optim.SGD(make(), lr=0.1)
    fusedfog.SGD(make(), lr=0.1)


# -- keys of param groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "lr"),
        ("weight_dcay", "weight_decay"),
        ("Mix", "mix"),
        ("momentun", "momentum"),
        ("qqqq", None),
    ],
)
def test_a_key_that_nobody_reads_warns(key: str, meant: str | None) -> None:
    says = rf"SGD: nothing reads '{key}' of param group [01]" + (
        rf"; did you mean '{meant}'\?" if meant else r" \(a key"
    )
    with pytest.warns(UserWarning, match=says):
        opt = fusedfog.SGD([{"params": parameters(), key: 1}], lr=0.1)
    with pytest.warns(UserWarning, match=says):
        opt.add_param_group({"params": parameters(), key: 1})


def test_around_another_optimizer_only_mix_is_ours_to_check() -> None:
    with pytest.warns(UserWarning, match="nothing reads 'mixed' of param group 0; did you mean 'mix'"):
        fusedfog.Decentralized(torch.optim.SGD([{"params": parameters(), "mixed": False, "own_thing": 3}], lr=0.1))


SCHEDULES: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10),
    lambda opt: torch.optim.lr_scheduler.CyclicLR(opt, 0.01, 0.1),
    lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
    lambda opt: torch.optim.swa_utils.SWALR(opt, 0.05),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_schedules_and_groups_of_other_optimizers_warn_of_nothing(
    schedule: Callable[[torch.optim.Optimizer], Any], wrapped: bool, recwarn: pytest.WarningsRecorder
) -> None:
    group = {name: 1 for name in PASSED_OVER - {"params", "param_names", "differentiable", "capturable", "fusedfog"}}
    group |= {"params": parameters(), "_mine": 3, "maximize": False, "foreach": None, "fused": None, "momentum": 0.9}
    opt: torch.optim.Optimizer = torch.optim.SGD([group], lr=0.1)
    opt = fusedfog.Decentralized(opt) if wrapped else fusedfog.SGD([group], lr=0.1)
    schedule(opt)
    fusedfog.SGD([{**one, "params": parameters()} for one in opt.param_groups], lr=0.1)
    fusedfog.SGD(torch.optim.AdamW(parameters()).param_groups[0]["params"], lr=0.1)
    opt.add_param_group({"params": parameters(), "name": "head"})
    assert not [one for one in recwarn if "nothing reads" in str(one.message)]


# -- the package -----------------------------------------------------------------------------------------------------


def test_the_package_shows_its_public_names_and_nothing_else() -> None:
    shown = [name for name in dir(fusedfog) if not name.startswith("_")]
    assert shown == sorted(fusedfog.__all__)
    for name in shown:
        assert getattr(fusedfog, name) is not None
    assert fusedfog.simulate.simulate
    assert fusedfog.plan.predict
    assert issubclass(fusedfog.AdamW, fusedfog.DecentralizedOptimizer)
    with pytest.raises(AttributeError, match="has no attribute 'simulat'"):
        fusedfog.simulat  # noqa: B018


def test_the_version_has_one_definition() -> None:
    import importlib.metadata

    assert fusedfog.__version__ == importlib.metadata.version("fusedfog")
