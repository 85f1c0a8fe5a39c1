"""Names of parameters, and what a pattern over them may be."""

import pytest

from cotnet_jax.models import parameter_names

NAMES = [
    "stem/conv1/kernel",
    "stem/bn/scale",
    "stage1_block0/cot/key_conv/kernel",
    "stage1_block1/conv1/kernel",
    "stage1_block10/conv1/kernel",
    "stage2_block0/conv1/kernel",
    "head/kernel",
    "head/bias",
]


def fitting(pattern):
    return [name for name in NAMES if parameter_names.fits(pattern, name)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("stem|stage[12].*", NAMES[:6]),
        ("stem", NAMES[:2]),
        ("stage1_block1", NAMES[3:4]),
        (r"stage\d_block\d+/conv1", NAMES[3:6]),
        (".*kernel", [name for name in NAMES if name.endswith("kernel")]),
        ("head/bias", NAMES[7:]),
        (".*/cot", NAMES[2:3]),
        ("stage", []),
        ("kernel", []),
        ("block", []),
    ],
)
def test_a_pattern_fits_whole_names_and_all_in_whole_modules(pattern, expected):
    assert fitting(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("stem|head", ["stem", "head"]),
        ("(stem|head)/.*", ["(stem|head)/.*"]),
        (r"a[|]b|c\|d", ["a[|]b", r"c\|d"]),
        ("[]|]|[^]|]", ["[]|]", "[^]|]"]),
        ("a(b(c|d)|e)|f", ["a(b(c|d)|e)", "f"]),
    ],
)
def test_alternatives_are_those_outside_of_groups(pattern, parts):
    assert parameter_names.alternatives(pattern) == parts


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (
            "stem|stage1",
            ["'stage1' fits", "'stage1.*' fits stage1_block0, stage1_block1, stage1_b"],
        ),
        ("hed", ["'hed' fits", "did you mean head"]),
        ("cot", ["'.*cot.*' fits stage1_block0/cot"]),
        ("layer4.*", ["their names begin with stem, stage1_block0"]),
    ],
)
def test_what_fits_nothing_is_told_with_near_names(pattern, words):
    (problem,) = parameter_names.find_unmatched(pattern, NAMES)
    for word in words:
        assert word in problem
    assert not parameter_names.find_unmatched("stem|stage.*|head", NAMES)
    assert len(parameter_names.find_unmatched("a|b|head", NAMES)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("head=10", {"head": 10}),
        ("head.*=10,stem.*=0.1", {"head.*": 10, "stem.*": 0.1}),
        (" head = 1e1 , stem=5e-2,", {"head": 10, "stem": 0.05}),
        (r"stage\d{1,2}.*=0.5,head=2", {r"stage\d{1,2}.*": 0.5, "head": 2}),
        ('{"head.*": 10}', {"head.*": 10}),
        ("{'head': 10, 'stem|stage1.*': 0.1}", {"head": 10, "stem|stage1.*": 0.1}),
    ],
)
def test_multipliers(text, expected):
    assert parameter_names.parse_multipliers(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("head", "must be like"),
        ("head=ten", "must be like"),
        ("head=1,stem", "'stem' must be like"),
        ("{'head'}", "must be like"),
        ("{'head': ", "must be like"),
        ("head=0", "above 0"),
        ("head=-1", "above 0"),
        ("he[ad=1", "'he[ad' is no regular expression: unterminated character set"),
    ],
)
def test_what_are_no_multipliers(text, message):
    with pytest.raises(ValueError) as error:
        parameter_names.parse_multipliers(text)
    assert message in str(error.value)


def test_what_is_no_pattern():
    for pattern in ("stem|", "|", "stage[1", "(stem"):
        with pytest.raises(ValueError):
            parameter_names.check_pattern(pattern)


def test_parts_of_parameters_join_again():
    params = {"stem": {"conv": {"kernel": 1}, "bn": {"scale": 2}}, "head": {"bias": 3}}
    rest, taken = parameter_names.split(params, ["stem/bn/scale"])
    assert taken == {"stem": {"bn": {"scale": 2}}}
    assert rest == {"stem": {"conv": {"kernel": 1}}, "head": {"bias": 3}}
    assert parameter_names.join(rest, taken) == params
    assert parameter_names.split(params, []) == (params, {})


def test_the_stem_is_deepest():
    blocks = [
        f"stage{s}_block{b}" for s, count in enumerate((3, 4, 23, 3), 1) for b in range(count)
    ]
    names = [f"{layer}/conv/kernel" for layer in sorted(["stem", *blocks, "head"])]
    depths = parameter_names.depths(names)
    # Block 10 comes after block 9, whatever the alphabet says.
    expected = ["head", *reversed(blocks), "stem"]
    assert depths == {f"{layer}/conv/kernel": depth for depth, layer in enumerate(expected)}
    without_head = parameter_names.depths(names[1:])
    assert without_head == {name: depths[name] for name in names[1:]}
