"""The colours of pages and pictures: a light and a dark form by name."""

from matplotlib.colors import LinearSegmentedColormap, to_hex

SERIES = 7  # s0, s1, ...: colours without an order
STEPS = 9  # r0, r1, ...: colours in order


def _steps(*colours: str) -> list[str]:
    """STEPS colours, interpolated between the given ones."""
    between = LinearSegmentedColormap.from_list("steps", colours, STEPS)
    return [to_hex(between(i)) for i in range(STEPS)]


# Figures are drawn with the light colours, which pages map to names: all are different. The series
# are variants of Okabe & Ito's colours (2008), distinct for colour-blind readers too.
PALETTE = {
    "paper": ("#fcfcfb", "#161615"),
    "card": ("#ffffff", "#1f1f1d"),
    "ink": ("#1c1c1a", "#ecebe6"),
    "soft": ("#5f5e5a", "#a5a39c"),
    "line": ("#dddcd7", "#3a3936"),
    "bar": ("#2a6fb5", "#6aa9e9"),
    "heat": ("#2a6fb6", "#3a7cc2"),
    "on-heat": ("#fefefe", "#fefefe"),
    "other": ("#b8b8b8", "#6a6a68"),
    "even": ("#d9e8f8", "#1d3a59"),
    "odd": ("#fbe6c8", "#52391a"),
    "end": ("#b3261e", "#ff8f85"),
    "s0": ("#1f6fb2", "#6db3f2"),
    "s1": ("#c8501e", "#ff9a66"),
    "s2": ("#0b8a67", "#4fd1a5"),
    "s3": ("#a8458c", "#ee9bd0"),
    "s4": ("#8a6d00", "#e0c04a"),
    "s5": ("#5b4fc4", "#a9a0ff"),
    "s6": ("#4a4a48", "#c9c8c2"),
}
_LIGHT = _steps("#e3a008", "#c2417c", "#2f3fa8")
_DARK = _steps("#8d6ff0", "#f0719f", "#ffd166")
PALETTE |= {f"r{i}": (_LIGHT[i], _DARK[i]) for i in range(STEPS)}
NAMES = {light: name for name, (light, _) in PALETTE.items()}


def colour(name: str) -> str:
    """The light form of a colour."""
    return PALETTE[name][0]
