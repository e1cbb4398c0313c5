"""The coordinates of tokens in torch, which `modeling_bipe.py` reads; bipe_jax writes this file beside it.

A segment rule is a dict with one of these, and perhaps "coarser", a list of [name, rule] in ascending order:

separators: ids of the tokens that end a segment.
length: the length of all segments.
automaton: "classes", "next" and "cuts" of an automaton over tokens, whose cuts end segments or, with
  "before", begin them. Class 0 has the ids that no other class has.

Shape letters: B batch, S tokens.
"""

import torch
from torch.nn import functional as F


def coordinates_of(tokens, real, rule):
    """The coordinates of every token of whole texts.

    Args:
      tokens: (B, S). real: (B, S) booleans, False for padding, which is not counted.
      rule: see above.

    Returns:
      "position", "segment", "offset", and those of coarser levels, each (B, S) int64; undefined for padding.
    """
    position = (real.cumsum(-1) - 1).clamp(min=0)
    result = {"position": position}
    begun, coarser = (position == 0) & real, ""
    for level, own in reversed([("segment", rule), *rule.get("coarser", ())]):
        cuts = cuts_of(tokens, position, real, own) & real
        begins = cuts if own.get("before") else _after(cuts, position, real)
        within, begun = begun, begun | (begins & real)
        count = begun.cumsum(-1)
        result[level] = (count - 1).clamp(min=0)
        offset = "offset" if level == "segment" else f"{level}_offset"
        result[offset] = position - (begun * position).cummax(-1).values
        if coarser:
            result[f"{level}_in_{coarser}"] = count - (within * count).cummax(-1).values
        coarser = level
    return result


def cuts_of(tokens, position, real, rule):
    """Whether each token ends its segment or, by a rule with "before", begins one: (B, S) booleans."""
    if length := rule.get("length", 0):
        return position % length == length - 1
    if "automaton" not in rule:
        return torch.isin(tokens, torch.tensor(rule.get("separators", []), device=tokens.device))
    machine = rule["automaton"]
    classes = torch.zeros_like(tokens)
    for number, ids in enumerate(machine["classes"], 1):
        classes[torch.isin(tokens, torch.tensor(ids, device=tokens.device))] = number
    following = torch.tensor(machine["next"], device=tokens.device)
    identity = torch.arange(len(following), device=tokens.device)
    # The maps that tokens are, from state to state (B, S, states), composed over 1, 2, 4, … tokens.
    after = torch.where(real[..., None], following.T[classes], identity)
    step = 1
    while step < tokens.shape[-1]:
        composed = after[:, step:].gather(-1, after[:, :-step])
        after = torch.cat([after[:, :step], composed], dim=1)
        step *= 2
    states = F.pad(after[:, :-1, 0], (1, 0))
    return torch.tensor(machine["cuts"], device=tokens.device)[states, classes]


def _after(cuts, position, real):
    """Whether the token before each one cuts, padding left out: (B, S) booleans."""
    latest = (real * (2 * (position + 1) + cuts)).cummax(-1).values
    return F.pad(latest[:, :-1], (1, 0)) % 2 == 1
