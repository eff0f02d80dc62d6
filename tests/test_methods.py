"""Every method in the loop: its flags, a resumed run, two processes."""

import inspect
import math

import pytest
import torch
from conftest import write_folder
from test_train import command, crash, logged, run, same, weights, words

import distill
import methods
import model
import train
from files import UserError, as_flag

EVERY = [name for name in methods.METHODS if name != "none"]
NEED_CLIP = {"c2vkd_clip", "c2vkd_language"}
NOT_FLAGS = {"variant", "widths", "classes", "has_embeddings"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set and a teacher for all tests."""
    place = tmp_path_factory.mktemp("methods")
    write_folder(place / "data")
    torch.manual_seed(0)
    model.save(place / "teacher.pt", model.build("nano", 3), dataset="folder")
    return place


def flags(place, method, *more):
    return "--teacher-ckpt", str(place / "teacher.pt"), "--method", method, *more


def steps(out):
    """The log's records of training steps."""
    return [record for record in logged(out) if "lr" in record]


def terms(record):
    return {k: v for k, v in record.items() if "/" in k}


def options(name):
    """What a method lets one choose, with its defaults."""
    known = inspect.signature(methods.METHODS[name]).parameters.values()
    return {p.name: p.default for p in known if p.default is not p.empty}


def test_every_option_of_every_method_is_a_flag_and_every_flag_an_option():
    found = {}
    for name in methods.METHODS:
        found |= {k: v for k, v in options(name).items() if k not in NOT_FLAGS}
    assert found.keys() == methods.FLAGS.keys()
    parsed = vars(train.get_args([]))
    assert all(parsed[name] is None for name in found)  # so that the method's own default holds


def test_the_help_tells_a_methods_defaults(capsys):
    with pytest.raises(SystemExit):
        train.get_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "whose positions TaT's softmax runs over (default teacher)",
        "stages whose tokens are compared (default 4)",
        "weight of at's term (default 10000)",
        "GL-Mixer adds its input, as an option of the authors' code does --",  # False: no default
    ):
        assert text in said


def build(spec, **chosen):
    return methods.build(spec, model.build("nano", 3), model.build("nano", 3), **chosen)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "c2vkd"])
def test_a_method_without_terms_is_refused(name):
    off = {option: 0.0 for option in options(name) if option.endswith("_weight")}
    with pytest.raises(UserError, match="nothing"):
        build(name, **off)
    build(name, **off | {min(off): 1.0})


@pytest.mark.parametrize("option", sorted(methods.ACTS_BY.keys() - NEED_CLIP))
def test_an_option_of_a_term_that_is_left_out_is_refused(option):
    """But for that which needs CLIP's weights, for which see test_c2vkd.py."""
    name, weight = option.split("_")[0], methods.ACTS_BY[option]
    default = options(name)[option]
    with pytest.raises(UserError, match=f"has no effect with {as_flag(weight)} 0"):
        build(name, **{option: default, weight: 0.0})
    build(name, **{option: default})


def others(option):
    """Values of an option beside its default."""
    owner = next(name for name in EVERY if option in options(name))
    default, (kind, _) = options(owner)[option], methods.FLAGS[option]
    if kind is bool:
        return owner, [not default]
    if isinstance(kind, list):
        return owner, [kind[:1]]
    if isinstance(kind[0], type):
        return owner, [1 if kind[0] is int else 2 * default + 0.5]
    return owner, [value for value in kind if value != default]


@pytest.mark.parametrize("option", sorted(methods.FLAGS.keys() - NEED_CLIP))
def test_every_option_does_something(option):
    """But for those that need CLIP's weights, for which see test_c2vkd.py."""
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(2, 3, 96, 128, generator=g), torch.randint(3, (2, 96, 128))

    def values(name, **chosen):
        torch.manual_seed(0)
        s, t = (model.build("nano", 3).eval() for _ in range(2))
        method = methods.build(name, s, t, **chosen)
        for step in range(2):  # a method with a memory has none in the first
            torch.manual_seed(step)
            found = method(s(images), t(images.flip(0)), images, labels)
        return {k: v.item() for k, v in found.items()} | dict(alone=method.replaces_ce)

    name, found = others(option)
    name = {"gl_init": "transkd-gl", "gl_residual": "transkd-gl"}.get(option, name)
    for value in found:
        assert values(name, **{option: value}) != pytest.approx(values(name), rel=1e-6), value


def test_an_option_of_another_method_is_refused():
    with pytest.raises(UserError, match="--ifvd-weight has no effect on --method skd"):
        build("skd", ifvd_weight=1.0)


def test_every_method_has_its_paper_and_is_listed(capsys):
    assert methods.PAPERS.keys() == methods.METHODS.keys()
    train.main(train.get_args(["--method", "list", "--student", "nano", "--teacher", "b0"]))
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said[2:]] == [*methods.METHODS]
    assert methods.PAPERS["transkd-base"] in said[3]


class MyMethod(distill.Method):
    """As the README says."""

    note = "mine is a try"

    def __init__(self, student_channels, teacher_channels):
        super().__init__()

    def forward(self, student, teacher, images, labels):
        return dict(mine=(student.logits - teacher.logits).square().mean())


class Clash(MyMethod):
    def forward(self, *a):
        return dict(ce=super().forward(*a)["mine"])


def test_a_method_of_ones_own(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods, "METHODS", methods.METHODS | dict(mine=MyMethod))
    run(place / "data", tmp_path / "out", *flags(place, "mine", "--log-every", "0"))
    assert {"ce", "mine"} <= steps(tmp_path / "out")[0].keys()
    assert "mine is a try\n" in capsys.readouterr().out
    train.main(train.get_args(["--method", "list"]))
    assert "mine " in capsys.readouterr().out
    monkeypatch.setitem(methods.METHODS, "mine", Clash)
    with pytest.raises(UserError, match="a method's term is called 'ce', as the cross-entropy"):
        run(place / "data", tmp_path / "clash", *flags(place, "mine"))
    for term, shape in ((0, "int"), (torch.ones(2), r"torch.Size\(\[2\]\)")):
        monkeypatch.setattr(MyMethod, "forward", lambda *a, term=term: dict(mine=term))
        monkeypatch.setitem(methods.METHODS, "mine", MyMethod)
        with pytest.raises(UserError, match=f"term 'mine' is no tensor of one number: {shape}"):
            run(place / "data", tmp_path / type(term).__name__, *flags(place, "mine"))


def test_a_resumed_run(place, tmp_path):
    """All methods at once: the same bits whether it is interrupted or not; queues and drawn rows
    included. What is deployed has nothing of them.
    """
    more = flags(place, "+".join(EVERY), "--save-every", "0", "--log-every", "0")
    run(place / "data", tmp_path / "whole", *more)
    with crash("student", 3):
        run(place / "data", tmp_path / "parts", *more)
    run(place / "data", tmp_path / "parts", *more, "--resume")
    whole, parts = steps(tmp_path / "whole"), steps(tmp_path / "parts")
    assert len(whole) == 6 and all(math.isfinite(v) for r in whole for v in terms(r).values())
    assert {term.split("/")[0] for term in terms(whole[0])} == {*EVERY}
    assert list(map(terms, whole)) == list(map(terms, parts))
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert weights(tmp_path / "whole").keys() == model.build("nano", 3).state_dict().keys()


def test_two_processes(place, tmp_path):
    """All methods at once: as of one process, but for terms that look across the images of one."""
    across = ("manifold/samples", "manifold/random", "c2vkd/graph", "cirkd/")
    logs = []
    for n in (1, 2):
        argv = words(place / "data", tmp_path / str(n), *flags(place, "+".join(EVERY)))
        child = command(*argv, "--max-iters", "2", "--log-every", "0", processes=n)
        _, errors = child.communicate()
        assert child.returncode == 0, errors
        logs.append(steps(tmp_path / str(n))[0])
    compared = [t for t in logs[0] if "/" in t and not t.startswith(across)]
    assert {t.split("/")[0] for t in compared} == set(EVERY) - {"cirkd"}
    for term in compared:
        assert logs[1][term] == pytest.approx(logs[0][term], rel=1e-3, abs=1e-6), term
    assert all(math.isfinite(v) for v in logs[1].values() if isinstance(v, float))
