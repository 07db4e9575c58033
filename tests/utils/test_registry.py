"""Names and parameters: read off classes, parsed and never evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.feature_masks import features_for
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import (
    METHODS,
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    Saliency,
    SmoothGrad,
)
from esegeta_monai.targets import TARGETS, Box, MultiClassMask
from esegeta_monai.utils.registry import Configurable, Registry, json_ready, split_calls


class Fruit(Configurable):
    """A base to register under."""


class Apple(Fruit):
    weight: float = 1.0
    inside: Fruit | None = None


class Pear(Fruit):
    """Written without dataclass."""

    def __init__(self, colour: str = "green") -> None:
        self.colour = colour


@pytest.mark.parametrize("decorator", [lambda cls: cls, dataclass(eq=False, repr=False)])
def test_a_subclass_is_a_dataclass_decorated_or_not(decorator):
    @decorator
    class Basket(Apple):
        """Its further fields have no plain default."""

        fruits: list[str] = field(default_factory=list)
        size: int = field(default=2, kw_only=True)

    assert Basket.parameter_names() == ["weight", "inside", "fruits", "size"]
    first, second = Basket(2.0, fruits=["fig"], name="mine"), Basket()
    second.fruits.append("plum")
    assert (first.weight, first.fruits, second.fruits, second.size) == (2.0, ["fig"], ["plum"], 2)
    assert (first.name, second.name, replace(first, size=3).size) == ("mine", "Basket", 3)
    assert first != Basket(2.0, fruits=["fig"])
    with pytest.raises(TypeError, match="positional"):
        Basket(2.0, None, [], "mine")


def test_an_own_init_is_inherited():
    class Quince(Pear):
        """Inherits the __init__ of Pear."""

    assert Quince.parameter_names() == ["colour"]
    assert (Quince("red").colour, Quince().name) == ("red", "Quince")


def test_an_own_init_may_call_its_base_before_it_sets_its_own():
    class Slices(Apple):
        def __init__(self, pieces: int = 4) -> None:
            super().__init__()
            self.pieces = pieces

    made = Slices(8.0)
    assert (made.parameters, type(made.pieces), made.name) == ({"pieces": 8}, int, "Slices")
    with pytest.raises(UsageError, match="pieces='many': give a whole number"):
        Slices("many")


def registry() -> Registry[Fruit]:
    fruits: Registry[Fruit] = Registry("fruit", Fruit, "esegeta_monai.fruits")
    fruits.register(Apple, "Malus")
    fruits.register(Pear)
    return fruits


@pytest.mark.parametrize("name", ["Apple", "apple", "a-p_ple", "MALUS", f"{__name__}.Apple"])
def test_names_are_tolerant(name):
    assert registry().get(name) is Apple


@pytest.mark.parametrize(
    ("wrong", "meant"), [("Salincy", "Saliency"), ("GradKam", "GradCam"), ("occlsion", "Occlusion")]
)
def test_the_best_match_comes_first(wrong, meant):
    with pytest.raises(UsageError, match=rf"did you mean {meant}(,|\?)"):
        METHODS.get(wrong)


@pytest.mark.parametrize("name", ["liver", "grey matter", "box of lesions"])
def test_a_class_given_as_a_target(name):
    """The error shows how to name a class; all interfaces make targets by this registry."""
    for make in (TARGETS.get, TARGETS.create, TARGETS.create_all):
        with pytest.raises(UsageError) as error:
            make(name)
        assert f"MultiClassMask('{name}')" in str(error.value)
        assert f"ClassScore('{name}')" in str(error.value)
    with pytest.raises(UsageError, match=r"did you mean MultiClassMask[^?]*\?$"):  # a target, misspelled
        TARGETS.get("multiclasmask")


def test_names_from_the_package_in_full():
    assert METHODS.get("esegeta_monai.methods.Saliency") is Saliency
    assert isinstance(METHODS.create("sali-ency"), Saliency)  # as `get`, which ignores hyphens
    assert TARGETS.get("esegeta_monai.targets.MultiClassMask") is MultiClassMask


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("Aple", "did you mean Apple"),
        ("Appel", "did you mean Apple"),
        ("xyzzy", "'esegeta-monai fruits' lists all fruits"),
        ("no.such.module", "cannot import"),
        ("pathlib.Path", "must derive from"),
        ("Apple(wieght=2)", "its parameters are: weight, inside, name"),
        ("Apple(weight=2", "cannot read"),
        ("Apple(weight=1+1)", "neither a value"),
        ("__import__('os').system('true')", "cannot|there is no"),
        ("Apple(weight=(lambda: 1)())", "neither a value|there is no|no fruit"),
        ("3", "cannot read"),
        (7, "cannot make a fruit"),
        ({"weight": 2}, "_target_"),
    ],
)
def test_errors_say_what_to_do(bad, message):
    with pytest.raises(UsageError, match=message):
        registry().create(bad)


def test_create_from_everything():
    fruits = registry()
    apple = Apple(2)
    assert fruits.create(apple) is apple
    assert isinstance(fruits.create(Apple), Apple)
    assert fruits.create("Apple(weight=2.5, name='red')").given_name == "red"
    assert fruits.create({"_target_": "apple", "weight": 3}).weight == 3
    nested = fruits.create({"_target_": "Apple", "inside": {"_target_": "Pear"}})
    assert isinstance(nested.inside, Pear)
    assert isinstance(fruits.create("Apple(inside=Pear(colour='red'))").inside, Pear)
    assert fruits.create("Apple(inside=Pear(colour='red'))").inside.colour == "red"
    assert fruits.create("Pear(colour=red)").colour == "red"
    assert fruits.create("Pear").name == "Pear"
    assert fruits.create("Apple(-2.5)").weight == -2.5


@pytest.mark.parametrize("text", ["", " ", " , "])
def test_text_that_names_nothing_is_refused(text):
    with pytest.raises(UsageError, match="no fruit is named: 'esegeta-monai fruits' lists all fruits"):
        registry().create_all(text)


def test_text_of_several():
    text = "Saliency, Occlusion(window=(8, 8), stride=4),input-x-gradient, SmoothGrad('Saliency')"
    methods = METHODS.create_all(text)
    assert [type(m) for m in methods] == [Saliency, Occlusion, InputXGradient, SmoothGrad]
    assert methods[1].window == (8, 8)
    assert [type(m) for m in METHODS.create_all(["Saliency", Saliency()])] == [Saliency, Saliency]
    assert [type(m) for m in METHODS.create_all(Saliency())] == [Saliency]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", ["a"]),
        ("a,,b,", ["a", "b"]),
        ("a(x='1,2'),b([1,(2,3)])", ["a(x='1,2')", "b([1,(2,3)])"]),
        ('a(")"),b', ['a(")")', "b"]),
        ("", []),
    ],
)
def test_split_calls(text, parts):
    assert split_calls(text) == parts


def test_a_taken_name_is_refused():
    class Other(Fruit):
        pass

    with pytest.raises(UsageError, match="is taken by"):
        registry().register(Other, "apple")


def test_the_registry_lists_each_class_once():
    assert list(registry()) == [Apple, Pear]


def test_entry_points_are_loaded(monkeypatch):
    class Entry:
        name = "cherry"

        def load(self):
            return type("Cherry", (Fruit,), {})

    monkeypatch.setattr("esegeta_monai.utils.registry.entry_points", lambda group: [Entry()])
    assert registry().get("cherry").__name__ == "Cherry"


def test_parameters_are_those_of_init_and_survive_json():
    import json

    for method in (Occlusion(window=(4, 4)), IntegratedGradients(baseline="blur(sigma=2)"), SmoothGrad(Occlusion(3))):
        again = json.loads(json.dumps(method.parameters))
        assert list(again) == type(method).parameter_names()
        assert "name" not in again
    assert SmoothGrad(Occlusion(3)).parameters["method"]["window"] == 3
    assert repr(Box(1, (0, 0), (2, 2))).startswith("Box(class_index=1, start=[0, 0]")


def test_json_ready():
    assert json_ready({1: torch.tensor(2.5), "f": Path("/secret/place/x.nii"), "t": torch.ones(2), "s": {3}}) == {
        "1": 2.5,
        "f": "x.nii",
        "t": "tensor(2,)",
        "s": [3],
    }
    assert json_ready(torch.float32) == "torch.float32"
    assert json_ready(len) == "len"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/scans/Jane Doe/atlas.nii.gz", "atlas.nii.gz"),
        (r"C:\scans\Doe\atlas.nii.gz", "atlas.nii.gz"),
        ("~/Doe/atlas.nii.gz", "atlas.nii.gz"),
        ("/atlas.nii.gz", "atlas.nii.gz"),
        ("LabelMap('/scans/Doe/atlas.nii.gz', names={1: 'a/b'})", "LabelMap('atlas.nii.gz', names={1: 'a/b'})"),
        ("supervoxels(mask=/scans/Doe/body.nii.gz, n_segments=4)", "supervoxels(mask=body.nii.gz, n_segments=4)"),
        ("models/atlas.nii.gz", "models/atlas.nii.gz"),
        ("grid(size=8)", "grid(size=8)"),
    ],
)
def test_whole_paths_are_shown_by_name(given, shown):
    """Records, names of files and reports show parameters; folders can be called after a patient."""
    assert FeatureAblation(given).parameters["feature_mask"] == shown
    assert Occlusion(baseline=[given, given]).parameters["baseline"] == [shown, shown]


@pytest.mark.parametrize(("make", "names"), [(baseline_for, "Blur, .*Zero"), (features_for, "Grid, .*Supervoxels")])
def test_kinds_that_no_command_lists_are_named_in_the_error(make, names):
    with pytest.raises(UsageError, match=f"'xyzzyq': there are .*{names}"):
        make("xyzzyq")
