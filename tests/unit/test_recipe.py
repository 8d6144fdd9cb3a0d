import re
from pathlib import Path

import pytest

from luthier.errors import MemoryPlanError, RecipeError, UsageError
from luthier.plan import parse_bytes
from luthier.recipe import Recipe, packaged

MINIMAL = "model: {base: smollm2-135m}\ndata: {train: [{path: rows.jsonl}]}\n"


def problem(text: str, *overrides: str) -> str:
    with pytest.raises((RecipeError, UsageError)) as caught:
        Recipe.parse(text, *overrides, name="my.yaml")
    return str(caught.value)


def test_a_dumped_recipe_reads_back_equal() -> None:
    recipe = Recipe.parse(MINIMAL, "train.lr=3e-4", "adapter.targets=[q_proj, v_proj]", "run.track=[tensorboard]")
    assert Recipe.parse(recipe.dump()) == recipe


def test_an_unknown_key_names_its_place_and_the_nearest_name() -> None:
    message = problem(MINIMAL + "train:\n  rate_of_learning: 1\n  schedul: linear\n")
    assert "my.yaml:5:3: train.schedul: unknown key; did you mean 'schedule'?" in message
    assert "my.yaml:4:3: train.rate_of_learning: unknown key" in message


def test_a_key_of_another_tool_is_answered_with_ours() -> None:
    message = "my.yaml:3:9: train.learning_rate: unknown key; here it is `train.lr`"
    assert problem(MINIMAL + "train: {learning_rate: 1}\n") == message


@pytest.mark.parametrize("override", ["train.lr=fast", "train.schedul=linear", "model.quantize.kind=nf5", "data=3"])
def test_a_fault_of_an_override_is_told_at_the_override_and_not_at_a_place_of_the_file(override: str) -> None:
    assert problem(MINIMAL + "train: {lr: 1}\n", "train.seed=1", override).startswith(f"{override}: ")


def test_a_key_that_is_given_again_is_told_by_its_last_override() -> None:
    given = ("train.lr=1e-4", "train={lr: bad}", "train.lr=bad2")
    assert problem(MINIMAL, *given).startswith("train.lr=bad2: train.lr: ")


@pytest.mark.parametrize("amount", ["8000000000", "8e9", "8000000000.0", "8GB"])
def test_an_amount_of_memory_may_be_any_number_of_bytes(amount: str) -> None:
    overridden = Recipe.parse(MINIMAL, f"run.memory={amount}")
    read = Recipe.parse(MINIMAL + f"run: {{memory: {amount}}}")
    assert parse_bytes(overridden.run.memory) == parse_bytes(read.run.memory) == 8_000_000_000


def test_an_amount_of_memory_without_its_unit_is_answered_with_one() -> None:
    with pytest.raises(MemoryPlanError, match=r"'1\.5' is less than a megabyte; write a unit, e\.g\. 6GiB"):
        parse_bytes(Recipe.parse(MINIMAL, "run.memory=1.5").run.memory)


def test_a_recipe_that_is_not_there_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "support.yaml").write_text(MINIMAL)
    for asked, near in ((tmp_path / "suport.yaml", tmp_path / "support.yaml"), (Path("tikets"), Path("tickets"))):
        with pytest.raises(RecipeError, match=re.escape(f"did you mean '{near}'?")):
            Recipe.load(asked)


def test_a_key_inside_a_list_names_its_place() -> None:
    message = problem("model: {base: b}\ndata:\n  train:\n    - {path: a, wieght: 2}\n")
    assert message == "my.yaml:4:17: data.train.0.wieght: unknown key; did you mean 'weight'?"


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("train.lr=0", "train.lr"),
        ("train.lr=.nan", "train.lr"),
        ("train.lr=-1", "train.lr"),
        ("train.lr=.inf", "train.lr"),
        ("train.samples_per_step=0", "train.samples_per_step"),
        ("train.epochs=0", "train.epochs"),
        ("adapter.rank=0", "adapter.rank"),
        ("adapter.dropout=1", "adapter.dropout"),
        ("data.supervise=prompts", "data.supervise"),
        ("data.train=[]", "data.train"),
        ("model.base=", "model.base"),
        ("train.keep=best", "recipe"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(override: str, field: str) -> None:
    assert f"{field}: " in problem(MINIMAL, override)


def test_overrides_reach_into_lists_and_take_yaml_values() -> None:
    recipe = Recipe.parse(MINIMAL, "data.train.0.weight=0.5", "train.max_steps=null", "train.warmup=0.1")
    assert (recipe.data.train[0].weight, recipe.train.max_steps, recipe.train.warmup) == (0.5, None, 0.1)


def test_warmup_is_steps_as_an_integer_and_a_share_as_a_fraction() -> None:
    assert Recipe.parse(MINIMAL, "train.warmup=5").train.warmup == 5
    assert isinstance(Recipe.parse(MINIMAL, "train.warmup=5").train.warmup, int)
    assert isinstance(Recipe.parse(MINIMAL, "train.warmup=0.0").train.warmup, float)


@pytest.mark.parametrize(
    "override", ["train", "=1", "train.=1", "train.lr.deep=1", "data.train.7.path=x", "train.lr=[1"]
)
def test_a_malformed_override_is_a_usage_error(override: str) -> None:
    with pytest.raises((UsageError, RecipeError)):
        Recipe.parse(MINIMAL, override)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just text",
        "- a\n- list\n",
        "model: {base: x\n",
        "model: {base: x}\nmodel: {base: y}\n",
        "model: !!python/object/apply:os.system ['true']\ndata: {}\n",
        "a: &a [*a]\n",
        "model: {base: x}\ndata: 3\n",
        "model:\n\tbase: x\n",
    ],
)
def test_a_file_that_is_no_recipe_is_refused_in_words(text: str) -> None:
    assert problem(text).startswith("my.yaml")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="luthier init"):
        Recipe.load(tmp_path / "none.yaml")


def test_a_binary_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Recipe.load(tmp_path / "b.yaml")


def test_how_a_run_is_run_is_not_part_of_what_is_learned() -> None:
    one, two = Recipe.parse(MINIMAL), Recipe.parse(MINIMAL, "run.engine=local", "run.micro_tokens=64")
    assert one.learned() == two.learned()
    assert set(one.diff(two)) == {"run.engine", "run.micro_tokens"}


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.parse(MINIMAL).train.lr = 1.0  # type: ignore[misc]


def test_the_packaged_recipe_is_found_by_name_and_is_valid() -> None:
    path = packaged("tickets")
    assert path is not None
    recipe = Recipe.load(path)
    assert all((path.parent / source.path).is_file() for source in recipe.data.train + recipe.data.test)
    assert packaged("no-such-recipe") is None


LORA = MINIMAL + "adapter: {kind: lora, rank: 4, alpha: 8, dropout: 0.1}\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.kind=bottleneck", "rank, alpha are keys of another kind; .*: adapter={kind: bottleneck}$"),
        ("adapter.kind=none", "rank, alpha, dropout are keys of another kind; .*: adapter={kind: none}$"),
        ("adapter.kind=botleneck", "adapter: there is no kind 'botleneck'; did you mean 'bottleneck'"),
        ("adapter=lora", "adapter: write a mapping: adapter={kind: lora}$"),
        ("adapter=", "adapter: write a mapping whose kind is one of lora, bottleneck, none, peft$"),
        ("model.quantize=nf4", "model.quantize: write a mapping: model.quantize={kind: nf4}$"),
        ("model.quantize={kind: int4}", "model.quantize: there is no kind 'int4'; did you mean 'int8'"),
        ("model.quantize={kind: zzz}", "there is no kind 'zzz'; known names: fp4, fp8, int8, nf4$"),
        ("model.quantize={double: true}", "write a mapping whose kind is one of nf4, fp4, int8, fp8$"),
        ("model.quantize={kind: nf4, threshold: 3}", "threshold is a key of another kind; take it out"),
    ],
)
def test_a_section_of_another_kind_is_answered_with_what_to_write(override: str, message: str) -> None:
    found = problem(LORA, override)
    assert re.search(message, found)
    assert "\n" not in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter={kind: none, blocks: 0}", "adapter.blocks: Input should be 'all' or greater than or equal to 1"),
        ("run.processes=0", "run.processes: Input should be 'auto' or greater than or equal to 1 (found 0)"),
        ("train.warmup=-1", "train.warmup: Input should be greater than or equal to 0 (found -1)"),
    ],
)
def test_a_value_that_could_be_of_several_types_is_one_problem(override: str, message: str) -> None:
    found = problem(MINIMAL, override)
    assert message in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.init=loftq"], r"loftq starts from what quantisation takes.*model\.quantize={kind: nf4}"),
        (
            ["adapter={kind: bottleneck}", "train.lora_plus=16"],
            r"lora_plus=16 .*adapter\.kind=bottleneck does not have",
        ),
        (["adapter={kind: none}", "train.lora_plus=16"], r"adapter\.kind=none does not have"),
        (["adapter={kind: peft, method: IA3}", "train.lora_plus=16"], r"adapter\.kind=peft does not have"),
        (["adapter.new_tokens=[' ']"], r"adapter\.new_tokens: ' ' is blank: a token needs a letter"),
        (["adapter.new_tokens=[ok, '']"], r"adapter\.new_tokens: '' is blank"),
    ],
)
def test_what_would_have_no_effect_or_no_start_is_refused(overrides: list[str], message: str) -> None:
    assert re.search(message, problem(MINIMAL, *overrides))
